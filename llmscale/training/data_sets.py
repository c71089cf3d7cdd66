"""The samples of data sets, as stages after pretraining draw them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import torch

from llmscale.training.batches import ModelBatch
from llmscale.training.data import Blended
from llmscale.training.rows import RowForm

Sample = TypeVar("Sample")
Given = TypeVar("Given", contravariant=True)
Given_co = TypeVar("Given_co", covariant=True)


class DataSetSamples(Protocol[Given_co]):
    """The samples of one data set, in a shuffled order."""

    def __len__(self) -> int: ...

    def sample(self, number: int) -> Given_co:
        """A sample by its number."""

    def row_lengths(self, number: int) -> Sequence[int]:
        """Tokens of each row of a sample."""

    def number_at(self, consumed: int) -> int:
        """Which sample comes after ``consumed`` others."""


class SampleObjective(Protocol[Given]):
    """Makes batches of samples, each a function of the samples alone."""

    @property
    def form(self) -> RowForm: ...

    def batch(self, samples: Sequence[Given], length: int, device: torch.device) -> ModelBatch:
        """A batch of samples, in rows of that length."""


@dataclass(frozen=True)
class DrawnSamples(Generic[Sample]):
    """Samples of data sets in turn, by their weights."""

    sources: Mapping[str, DataSetSamples[Sample]]
    weights: Mapping[str, float]
    objective: SampleObjective[Sample]
    first_step: int = 0

    @cached_property
    def _blended(self) -> Blended[DataSetSamples[Sample]]:
        return Blended(self.sources, self.weights)

    def samples(self, places: Sequence[int]) -> list[Sample]:
        """Those at some places of the run's order."""
        return [source.sample(number) for source, number in self._found(places)]

    def batch(self, places: Sequence[int], length: int, device: torch.device) -> ModelBatch:
        return self.objective.batch(self.samples(places), length, device)

    def arranged(self, step: range) -> Sequence[int]:
        lengths = dict(zip(step, self._longest_rows(step), strict=True))
        return sorted(step, key=lambda place: lengths[place])

    def length(self, places: Sequence[int]) -> int:
        return self.objective.form.length(max(self._longest_rows(places)))

    def row_lengths(self, step: range) -> Sequence[int]:
        rows = (source.row_lengths(number) for source, number in self._found(step))
        return [length for own in rows for length in own]

    def tokens(self, step: range) -> int:
        return sum(self.row_lengths(step))

    def name(self, place: int) -> str:
        return self._blended.name(place)

    def _longest_rows(self, places: Sequence[int]) -> list[int]:
        return [max(source.row_lengths(number)) for source, number in self._found(places)]

    def _found(self, places: Sequence[int]) -> list[tuple[DataSetSamples[Sample], int]]:
        return [self._blended.find(place) for place in places]


@dataclass(frozen=True)
class FirstSamples(Generic[Sample]):
    """The first samples of every data set, at most ``most`` of each, the shortest first.

    ``one_length``: whether all batches are padded to one length.
    """

    sources: Sequence[DataSetSamples[Sample]]
    most: int
    objective: SampleObjective[Sample]
    one_length: bool

    @cached_property
    def _places(self) -> list[tuple[DataSetSamples[Sample], int]]:
        """Each one's data set and number in it."""
        places = [
            (source, number)
            for source in self.sources
            for number in range(min(len(source), self.most))
        ]
        return sorted(places, key=_longest_row)

    def __len__(self) -> int:
        return len(self._places)

    def sample(self, number: int) -> Sample:
        """A sample by its number."""
        source, own = self._places[number]
        return source.sample(own)

    def batch(self, numbers: Sequence[int], device: torch.device) -> ModelBatch:
        present = [min(number, len(self) - 1) for number in numbers]
        longest = self._places[-1 if self.one_length else max(present)]
        length = self.objective.form.length(_longest_row(longest))
        counts = torch.tensor([number < len(self) for number in numbers], device=device)
        samples = [self.sample(number) for number in present]
        return self.objective.batch(samples, length, device).counting(counts)


def _longest_row(place: tuple[DataSetSamples[Sample], int]) -> int:
    source, number = place
    return max(source.row_lengths(number))
