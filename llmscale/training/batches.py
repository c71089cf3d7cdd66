"""What a model is given in one pass, and what is made of its outputs.

Shape legend: b samples, s sequence length, t tokens that T5's decoder predicts.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from llmscale.parallel.context import own_places


@dataclass(frozen=True)
class LossSum:
    """A loss as a sum, so that any split of a global batch gives the same gradient.

    Attributes:
        total: what is minimized, summed over ``count`` tokens or samples.
        told: sums of the batch's ``figures``, over the same number.
    """

    total: Tensor
    count: Tensor
    told: Tensor

    def vector(self) -> Tensor:
        """Loss, count and figures in fp64, as they are summed over micro-batches and ranks."""
        both = torch.stack([self.total.detach().double(), self.count.double()])
        return torch.cat([both, self.told.detach().double()])


class ModelBatch(Protocol):
    """What a model is given in one pass, and its loss."""

    @property
    def figures(self) -> tuple[str, ...]:
        """What is told of a batch besides its loss."""

    @property
    def samples(self) -> int:
        """Rows of tokens in the batch."""

    @property
    def length(self) -> int:
        """Tokens a row, as they travel through a pipeline."""

    @property
    def count(self) -> Tensor:
        """The tokens or samples that the loss is summed over."""

    @property
    def labels_bs(self) -> Tensor | None:
        """What is to be predicted; None where a model is to score."""

    def loss(self, outputs: Tensor) -> LossSum:
        """The loss of losses a token ``[b, s]``, or of scores a token ``[b, s, k]``."""

    def counting(self, counts: Tensor) -> Self:
        """The same batch, where only samples with a true flag count."""

    def part(self, rank: int, ranks: int) -> Self:
        """What one rank of a context-parallel group has of the batch."""

    def model_inputs(self) -> dict[str, Any]:
        """The arguments of the model, but for the labels."""


def masked_sum(losses_bs: Tensor, mask_bs: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss and the number of tokens it was summed over; masked ones may be NaN."""
    counted_bs = torch.where(mask_bs > 0, losses_bs.float() * mask_bs, 0.0)
    return counted_bs.sum(), mask_bs.sum().to(torch.int)


def no_figures(like: Tensor) -> Tensor:
    """The sums of a batch that tells nothing besides its loss."""
    return torch.zeros(0, dtype=torch.float64, device=like.device)


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """Rows of tokens, for a decoder or an encoder.

    ``segments_bs`` numbers the segments within which tokens see each other; none is one
    segment a sample. It stays whole when the rest is split over a context-parallel group,
    since a rank's queries see all keys.
    """

    tokens_bs: Tensor
    positions_bs: Tensor
    segments_bs: Tensor | None = None

    @property
    def samples(self) -> int:
        return self.tokens_bs.shape[0]

    @property
    def length(self) -> int:
        return self.tokens_bs.shape[1]

    def model_inputs(self) -> dict[str, Any]:
        return {
            "input_ids": self.tokens_bs,
            "position_ids": self.positions_bs,
            "attention_mask": self.segments_bs,
        }


@dataclass(frozen=True, kw_only=True)
class WholeTextBatch(TextBatch):
    """Texts of which each is judged as a whole: recipes refuse to split them over a sequence."""

    def part(self, rank: int, ranks: int) -> Self:
        assert ranks == 1, "a text that is judged as a whole is on one context-parallel rank"
        return self


@dataclass(frozen=True, kw_only=True)
class PredictedTokens:
    """What is to be predicted at each token, and which predictions count."""

    labels_bs: Tensor
    mask_bs: Tensor

    figures: ClassVar[tuple[str, ...]] = ()

    @property
    def count(self) -> Tensor:
        return self.mask_bs.sum().to(torch.int)

    def loss(self, outputs: Tensor) -> LossSum:
        return LossSum(*masked_sum(outputs, self.mask_bs), no_figures(outputs))

    def counting(self, counts: Tensor) -> Self:
        return replace(self, mask_bs=self.mask_bs * counts[:, None])


@dataclass(frozen=True, kw_only=True)
class TokenBatch(TextBatch, PredictedTokens):
    """Tokens, what is to be predicted at each, and which predictions count."""

    def part(self, rank: int, ranks: int) -> Self:
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


@dataclass(frozen=True, kw_only=True)
class SpanBatch(PredictedTokens):
    """What an encoder reads, what its decoder is given, and what that is to predict.

    ``labels_bs`` and ``mask_bs`` are the decoder's: ``[b, t]``.
    """

    inputs_bs: Tensor
    decoder_inputs_bt: Tensor

    @property
    def samples(self) -> int:
        return self.inputs_bs.shape[0]

    @property
    def length(self) -> int:
        return self.inputs_bs.shape[1] + self.decoder_inputs_bt.shape[1]

    def part(self, rank: int, ranks: int) -> Self:
        """What one rank of a context-parallel group has: a part of each of both sequences."""
        if ranks == 1:
            return self
        encoder, decoder = (
            own_places(tokens.shape[1], rank, ranks).to(tokens.device)
            for tokens in (self.inputs_bs, self.decoder_inputs_bt)
        )
        return replace(
            self,
            inputs_bs=self.inputs_bs[:, encoder],
            decoder_inputs_bt=self.decoder_inputs_bt[:, decoder],
            labels_bs=self.labels_bs[:, decoder],
            mask_bs=self.mask_bs[:, decoder],
        )

    def model_inputs(self) -> dict[str, Any]:
        return {"input_ids": self.inputs_bs, "decoder_input_ids": self.decoder_inputs_bt}


def spans_alone(inputs_bs: Tensor, decoder_inputs_bt: Tensor) -> SpanBatch:
    """A batch to look at, not to learn from: the decoder's tokens are their own labels."""
    ones = torch.ones(decoder_inputs_bt.shape, dtype=torch.float32, device=inputs_bs.device)
    return SpanBatch(
        inputs_bs=inputs_bs,
        decoder_inputs_bt=decoder_inputs_bt,
        labels_bs=decoder_inputs_bt,
        mask_bs=ones,
    )


def tokens_alone(tokens_bs: Tensor) -> TokenBatch:
    """A batch to look at, not to learn from: every token is its own label."""
    positions = torch.arange(tokens_bs.shape[1], device=tokens_bs.device).expand_as(tokens_bs)
    ones = torch.ones(tokens_bs.shape, dtype=torch.float32, device=tokens_bs.device)
    return TokenBatch(
        tokens_bs=tokens_bs, labels_bs=tokens_bs, mask_bs=ones, positions_bs=positions
    )
