"""Examples as rows of tokens, all of one length.

Shape legend: b rows, s tokens a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
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
        rows = Rows(
            torch.full(shape, self.padding, dtype=torch.int64),
            torch.full(shape, self.padding, dtype=torch.int64),
            torch.zeros(shape, dtype=torch.float32),
            torch.zeros(shape, dtype=torch.int64),
            torch.zeros(shape, dtype=torch.int32),
        )
        for number, examples in enumerate(samples):
            _fill(rows, number, examples)
        return Rows(*(column.to(device) for column in vars(rows).values()))


def _fill(rows: Rows, row: int, examples: Sequence[Example]) -> None:
    first, length = 0, rows.tokens_bs.shape[1]
    for segment, example in enumerate(examples):
        end = first + len(example)
        tokens_n = torch.from_numpy(np.asarray(example.tokens_n, dtype=np.int64))
        learned_n = torch.from_numpy(np.asarray(example.learned_n, dtype=np.float32))
        rows.tokens_bs[row, first:end] = tokens_n
        rows.labels_bs[row, first : end - 1] = tokens_n[1:]
        rows.mask_bs[row, first : end - 1] = learned_n[1:]
        rows.positions_bs[row, first:end] = torch.arange(len(example))
        rows.segments_bs[row, first:end] = segment
        first = end
    rows.positions_bs[row, first:] = torch.arange(length - first)
    rows.segments_bs[row, first:] = len(examples)
