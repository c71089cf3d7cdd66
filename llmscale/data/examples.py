"""Examples on disk: every one's tokens, one behind the other, in safetensors.

Shape legend: n tokens of an example.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from llmscale.data.chat import Example
from llmscale.data.order import number_at
from llmscale.data.packing import packed


def write_examples(examples: Sequence[Example], file: Path) -> None:
    """Writes examples so that ``Examples`` reads them back."""
    save_file(columns_of(examples), file)


def columns_of(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Examples as they are stored."""
    return {
        "tokens": _joined((example.tokens_n for example in examples), np.int32),
        "learned": _joined((example.learned_n for example in examples), np.bool_),
        "ends": np.cumsum([len(example) for example in examples], dtype=np.int64),
    }


def _joined(parts: Iterable[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False)


class Examples:
    """Examples by their numbers, out of ``columns_of``."""

    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        self._columns = columns
        self._ends = columns["ends"]

    @classmethod
    def read(cls, file: Path) -> "Examples":
        """What ``write_examples`` wrote."""
        return cls(load_file(file))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> Example:
        if not 0 <= number < len(self):
            raise IndexError(number)
        own = slice(self._ends[number - 1] if number else 0, self._ends[number])
        return Example(self._columns["tokens"][own], self._columns["learned"][own])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.diff(self._ends, prepend=0)


@dataclass(frozen=True)
class ExampleSamples:
    """Samples of one or, packed, several examples; every epoch has an order of its own.

    Args:
        room: tokens a sample has at most.
        packing: put several examples into a sample.
    """

    examples: Examples
    room: int
    packing: bool
    seed: int

    @cached_property
    def _members(self) -> list[list[int]]:
        lengths = self.examples.lengths.tolist()
        return packed(lengths, self.room) if self.packing else [[n] for n in range(len(lengths))]

    def __len__(self) -> int:
        return len(self._members)

    def sample(self, number: int) -> list[Example]:
        """The examples of a sample."""
        return [self.examples[example] for example in self._members[number]]

    def tokens(self, number: int) -> int:
        """Tokens of a sample."""
        return int(sum(self.examples.lengths[example] for example in self._members[number]))

    def row_lengths(self, number: int) -> list[int]:
        """Tokens of the one row that a sample is."""
        return [self.tokens(number)]

    def number_at(self, consumed: int) -> int:
        """Which sample comes after ``consumed`` others."""
        return number_at(consumed, len(self), self.seed)
