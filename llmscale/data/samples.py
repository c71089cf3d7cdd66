"""Samples of a token stream: the global batch is a function of the seed and the step.

Shape legend: s sequence length.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llmscale.data.order import number_at


class Stream(Protocol):
    """Tokens one behind the other."""

    def __len__(self) -> int: ...

    def window(self, start: int, length: int) -> np.ndarray:
        """``length`` tokens from ``start`` on, as int64."""


@dataclass(frozen=True)
class Samples:
    """Windows of ``sequence_length + 1`` tokens; neighbours share the one token between."""

    stream: Stream
    sequence_length: int
    seed: int

    def __post_init__(self) -> None:
        if len(self) < 1:
            raise ValueError(
                f"{len(self.stream)} tokens are too few for one sample of "
                f"{self.sequence_length} + 1; add text or shorten sequence_length"
            )

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.sequence_length

    def window(self, number: int) -> np.ndarray:
        """Sample ``number`` in the stream's own order: ``[s + 1]``."""
        return self.stream.window(number * self.sequence_length, self.sequence_length + 1)

    def number_at(self, consumed: int) -> int:
        """Which sample comes after ``consumed`` others; every epoch has an order of its own."""
        return number_at(consumed, len(self), self.seed)


def rank_places(
    *, consumed: int, global_batch: int, micro_batch: int, data_rank: int, data_ranks: int
) -> list[list[int]]:
    """This data rank's micro-batches of the global batch, as places in the shuffled order."""
    own = range(consumed + data_rank, consumed + global_batch, data_ranks)
    places = list(own)
    return [places[i : i + micro_batch] for i in range(0, len(places), micro_batch)]
