"""What a model is given in one pass, and which of its predictions count.

Shape legend: b samples, s sequence length, t tokens that T5's decoder predicts.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmscale.parallel.context import own_places


@dataclass(frozen=True)
class TokenBatch:
    """Tokens, what is to be predicted at each, and which predictions count.

    ``segments_bs`` numbers the segments within which tokens see each other; none is one
    segment a sample. It stays whole when the rest is split over a context-parallel group,
    since a rank's queries see all keys.
    """

    tokens_bs: Tensor
    labels_bs: Tensor
    mask_bs: Tensor
    positions_bs: Tensor
    segments_bs: Tensor | None = None

    @property
    def samples(self) -> int:
        """Samples in the batch."""
        return self.tokens_bs.shape[0]

    @property
    def length(self) -> int:
        """Tokens a sample, as they travel through a pipeline."""
        return self.tokens_bs.shape[1]

    def counting(self, counts_b: Tensor) -> "TokenBatch":
        """The same batch, where only samples with a true flag count."""
        return replace(self, mask_bs=self.mask_bs * counts_b[:, None])

    def part(self, rank: int, ranks: int) -> "TokenBatch":
        """What one rank of a context-parallel group has of the batch."""
        if ranks == 1:
            return self
        places = own_places(self.length, rank, ranks).to(self.tokens_bs.device)
        return replace(
            self,
            tokens_bs=self.tokens_bs[:, places],
            labels_bs=self.labels_bs[:, places],
            mask_bs=self.mask_bs[:, places],
            positions_bs=self.positions_bs[:, places],
        )

    def model_inputs(self) -> dict[str, Any]:
        """The arguments of the model, but for the labels."""
        return {
            "input_ids": self.tokens_bs,
            "position_ids": self.positions_bs,
            "attention_mask": self.segments_bs,
        }


@dataclass(frozen=True)
class SpanBatch:
    """What an encoder reads, what its decoder is given, and what that is to predict.

    ``labels_bs`` and ``mask_bs`` are the decoder's: ``[b, t]``.
    """

    inputs_bs: Tensor
    decoder_inputs_bt: Tensor
    labels_bs: Tensor
    mask_bs: Tensor

    @property
    def samples(self) -> int:
        """Samples in the batch."""
        return self.inputs_bs.shape[0]

    @property
    def length(self) -> int:
        """Tokens a sample, as they travel through a pipeline: the encoder's and decoder's."""
        return self.inputs_bs.shape[1] + self.decoder_inputs_bt.shape[1]

    def counting(self, counts_b: Tensor) -> "SpanBatch":
        """The same batch, where only samples with a true flag count."""
        return replace(self, mask_bs=self.mask_bs * counts_b[:, None])

    def part(self, rank: int, ranks: int) -> "SpanBatch":
        """What one rank of a context-parallel group has: a part of each of both sequences."""
        if ranks == 1:
            return self
        encoder, decoder = (
            own_places(tokens.shape[1], rank, ranks).to(tokens.device)
            for tokens in (self.inputs_bs, self.decoder_inputs_bt)
        )
        return SpanBatch(
            inputs_bs=self.inputs_bs[:, encoder],
            decoder_inputs_bt=self.decoder_inputs_bt[:, decoder],
            labels_bs=self.labels_bs[:, decoder],
            mask_bs=self.mask_bs[:, decoder],
        )

    def model_inputs(self) -> dict[str, Any]:
        """The arguments of the model, but for the labels."""
        return {"input_ids": self.inputs_bs, "decoder_input_ids": self.decoder_inputs_bt}


ModelBatch = TokenBatch | SpanBatch


def spans_alone(inputs_bs: Tensor, decoder_inputs_bt: Tensor) -> SpanBatch:
    """A batch to look at, not to learn from: the decoder's tokens are their own labels."""
    ones = torch.ones(decoder_inputs_bt.shape, dtype=torch.float32, device=inputs_bs.device)
    return SpanBatch(inputs_bs, decoder_inputs_bt, decoder_inputs_bt, ones)


def tokens_alone(tokens_bs: Tensor) -> TokenBatch:
    """A batch to look at, not to learn from: every token is its own label."""
    positions = torch.arange(tokens_bs.shape[1], device=tokens_bs.device).expand_as(tokens_bs)
    ones = torch.ones(tokens_bs.shape, dtype=torch.float32, device=tokens_bs.device)
    return TokenBatch(tokens_bs, tokens_bs, ones, positions)
