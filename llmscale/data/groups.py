"""Texts that are judged together, on disk in safetensors.

Shape legend: g groups.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from llmscale.data.chat import Example
from llmscale.data.examples import Examples, columns_of
from llmscale.data.order import number_at


@dataclass(frozen=True)
class Group:
    """Texts that are judged together.

    Attributes:
        texts: the best first, where they are compared.
        margin: by how much the first is to score above the second.
        target: the score of a single text, or 1 for a wanted one and 0 for an unwanted one.
        head: the number of the head that is to score them.
        references: what a reference model makes of each text, where that is known.
    """

    texts: tuple[Example, ...]
    margin: float = 0.0
    target: float = math.nan
    head: int = 0
    references: tuple[float, ...] = ()


def write_groups(groups: Sequence[Group], file: Path) -> None:
    """Writes groups, but for heads and references, so that ``Groups`` reads them back."""
    columns = {
        **columns_of([text for group in groups for text in group.texts]),
        "group_ends": np.cumsum([len(group.texts) for group in groups], dtype=np.int64),
        "margins": np.array([group.margin for group in groups], np.float64),
        "targets": np.array([group.target for group in groups], np.float64),
    }
    save_file(columns, file)


class Groups:
    """What ``write_groups`` wrote.

    Args:
        head: of all its groups.
        references: what a reference model makes of each text, one group after another.
    """

    def __init__(self, file: Path, head: int = 0, references: np.ndarray | None = None) -> None:
        self._columns: Mapping[str, np.ndarray] = load_file(file)
        self._ends_g = self._columns["group_ends"]
        self.texts = Examples(self._columns)
        self._head, self._references = head, references

    def __len__(self) -> int:
        return len(self._ends_g)

    def __getitem__(self, number: int) -> Group:
        own = self.members(number)
        known = self._references
        return Group(
            tuple(self.texts[text] for text in own),
            float(self._columns["margins"][number]),
            float(self._columns["targets"][number]),
            self._head,
            () if known is None else tuple(known[own.start : own.stop].tolist()),
        )

    def members(self, number: int) -> range:
        """The numbers of a group's texts."""
        return range(self._ends_g[number - 1] if number else 0, self._ends_g[number])


@dataclass(frozen=True)
class GroupSamples:
    """A group a sample; every epoch has an order of its own."""

    groups: Groups
    seed: int

    def __len__(self) -> int:
        return len(self.groups)

    def sample(self, number: int) -> Group:
        """The group of a sample."""
        return self.groups[number]

    def row_lengths(self, number: int) -> list[int]:
        """Tokens of each text of a sample."""
        return [int(self.groups.texts.lengths[text]) for text in self.groups.members(number)]

    def number_at(self, consumed: int) -> int:
        """Which sample comes after ``consumed`` others."""
        return number_at(consumed, len(self), self.seed)
