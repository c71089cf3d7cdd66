"""Examples as rows of tokens, all of one length.

Shape legend: b rows, s tokens a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmscale.data.chat import Example


@dataclass(frozen=True)
class Rows:
    """Rows of tokens: those of examples, then padding, which is a segment of its own.

    ``labels_bs`` are the tokens that follow; ``mask_bs`` says which of these are learned.
    """

    tokens_bs: Tensor
    labels_bs: Tensor
    mask_bs: Tensor
    positions_bs: Tensor
    segments_bs: Tensor

    def to(self, device: torch.device) -> "Rows":
        """The same on another device."""
        return Rows(*(column.to(device) for column in vars(self).values()))

    def chosen(self, numbers: Sequence[int]) -> "Rows":
        """Some of the rows, by their numbers."""
        own = list(numbers)
        return Rows(*(column[own] for column in vars(self).values()))


@dataclass(frozen=True)
class RowForm:
    """How examples become rows.

    Attributes:
        padding: the token that fills rows up; it stands behind all others, which do not see it.
        room: tokens a row has at most.
        multiple: of which the number of tokens is one, as a layout may need.
        shared: whether texts that are scored share rows, so that little is padding; not where
            all of a step's batches must have one shape.
    """

    padding: int
    room: int
    multiple: int
    shared: bool = False

    def length(self, longest: int) -> int:
        """The tokens a row, where the longest of a step has that many."""
        return min(self.room, -(-longest // self.multiple) * self.multiple)

    def rows(self, samples: Sequence[Sequence[Example]], length: int, device: torch.device) -> Rows:
        """A row for every sample; its examples follow each other, positions begin anew."""
        shape = len(samples), length
        columns = (
            np.full(shape, self.padding, dtype=np.int64),
            np.full(shape, self.padding, dtype=np.int64),
            np.zeros(shape, dtype=np.float32),
            np.zeros(shape, dtype=np.int64),
            np.zeros(shape, dtype=np.int32),
        )
        for number, examples in enumerate(samples):
            _fill([column[number] for column in columns], examples)
        return Rows(*(torch.from_numpy(column).to(device) for column in columns))


def _fill(row: Sequence[NDArray[Any]], examples: Sequence[Example]) -> None:
    tokens_s, labels_s, mask_s, positions_s, segments_s = row
    first = 0
    for segment, example in enumerate(examples):
        end = first + len(example)
        tokens_s[first:end] = example.tokens_n
        labels_s[first : end - 1] = example.tokens_n[1:]
        mask_s[first : end - 1] = example.learned_n[1:]
        positions_s[first:end] = np.arange(len(example))
        segments_s[first:end] = segment
        first = end
    positions_s[first:] = np.arange(len(tokens_s) - first)
    segments_s[first:] = len(examples)
