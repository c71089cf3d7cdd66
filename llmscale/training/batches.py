"""What a model is given in one pass, and which of its predictions count.

Shape legend: b samples, s sequence length.
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


def tokens_alone(tokens_bs: Tensor) -> TokenBatch:
    """A batch to look at, not to learn from: every token is its own label."""
    positions = torch.arange(tokens_bs.shape[1], device=tokens_bs.device).expand_as(tokens_bs)
    ones = torch.ones(tokens_bs.shape, dtype=torch.float32, device=tokens_bs.device)
    return TokenBatch(tokens_bs, tokens_bs, ones, positions)
