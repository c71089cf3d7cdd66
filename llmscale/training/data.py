"""The samples of each step, and those of validation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from llmscale.data.blend import Blend
from llmscale.data.samples import Samples
from llmscale.training.batches import ModelBatch
from llmscale.training.curriculum import PlacedPhase
from llmscale.training.objectives import Objective
from llmscale.training.settings import Batch


class Ordered(Protocol):
    """Samples in a shuffled order."""

    def number_at(self, consumed: int) -> int:
        """Which sample comes after ``consumed`` others."""


Source = TypeVar("Source", bound=Ordered)


class StepSamples(Protocol):
    """Where samples come from; ``step`` are the places of a step's whole global batch."""

    @property
    def first_step(self) -> int:
        """The step from which on they do (0 is the first)."""

    def batch(self, places: Sequence[int], length: int, device: torch.device) -> ModelBatch:
        """The samples at some of a step's places, and what is to be predicted.

        Args:
            length: the model's tokens a sample, in that step.
        """

    def arranged(self, step: range) -> Sequence[int]:
        """A step's places as they are dealt out: such of like length are near each other."""

    def length(self, places: Sequence[int]) -> int:
        """The model's tokens a row, where these samples are padded to one length."""

    def row_lengths(self, step: range) -> Sequence[int]:
        """The model's tokens of each row in a step, without padding."""

    def tokens(self, step: range) -> int:
        """Tokens of text the step reads, whether they are predicted or not."""

    def name(self, place: int) -> str:
        """A sample, as a log's line names it."""


@dataclass(frozen=True)
class Blended(Generic[Source]):
    """Sources in turn by their weights, each in its own shuffled order.

    Attributes:
        first: the place of the run's order where this begins.
        read: samples of each source that were read before.
    """

    sources: Mapping[str, Source]
    weights: Mapping[str, float]
    first: int = 0
    read: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def _blend(self) -> Blend:
        return Blend(self.weights)

    def find(self, place: int) -> tuple[Source, int]:
        """The source and the sample's number in it, at a place of the whole run's order."""
        name, number = self._find(place)
        return self.sources[name], number

    def name(self, place: int) -> str:
        """A sample's number, after its source if there are several."""
        name, number = self._find(place)
        return f"{name} {number}" if len(self.sources) > 1 else str(number)

    def _find(self, place: int) -> tuple[str, int]:
        name, before = self._blend.place(place - self.first)
        return name, self.sources[name].number_at(self.read.get(name, 0) + before)


@dataclass(frozen=True)
class PhaseSamples:
    """The samples of one phase of pretraining: windows of its corpora."""

    phase: PlacedPhase
    sources: Mapping[str, Samples]
    objective: Objective

    @cached_property
    def _blended(self) -> Blended[Samples]:
        phase = self.phase
        return Blended(self.sources, phase.weights, phase.first_sample, phase.read)

    @property
    def first_step(self) -> int:
        return self.phase.first_step

    def batch(self, places: Sequence[int], length: int, device: torch.device) -> ModelBatch:
        found = [self._blended.find(place) for place in places]
        windows = [source.window(number) for source, number in found]
        return self.objective.batch(np.stack(windows), places, device)

    def arranged(self, step: range) -> Sequence[int]:
        return step

    def length(self, places: Sequence[int]) -> int:
        return self.phase.sequence_length

    def row_lengths(self, step: range) -> Sequence[int]:
        return [self.phase.sequence_length] * len(step)

    def tokens(self, step: range) -> int:
        return len(step) * next(iter(self.sources.values())).sequence_length

    def name(self, place: int) -> str:
        return self._blended.name(place)


@dataclass(frozen=True)
class StepBatch:
    """One step's global batch: ``size`` samples from place ``first`` of the run's order on.

    ``one_length``: whether all its micro-batches are padded to one length.
    """

    samples: StepSamples
    first: int
    size: int
    one_length: bool

    @property
    def places(self) -> range:
        """The places of its samples."""
        return range(self.first, self.first + self.size)

    def batch(self, places: Sequence[int], device: torch.device) -> ModelBatch:
        """The samples at some of its places."""
        length = self._longest if self.one_length else self.samples.length(places)
        return self.samples.batch(places, length, device)

    @cached_property
    def _longest(self) -> int:
        return self.samples.length(self.places)

    @property
    def arranged(self) -> Sequence[int]:
        """The places as they are dealt out to micro-batches."""
        return self.samples.arranged(self.places)

    @property
    def row_lengths(self) -> Sequence[int]:
        """The model's tokens of each row, without padding."""
        return self.samples.row_lengths(self.places)

    @property
    def tokens(self) -> int:
        """Tokens of text it reads, whether they are predicted or not."""
        return self.samples.tokens(self.places)


@dataclass(frozen=True)
class TrainingData:
    """What every step trains on: a function of its number and of the samples before it.

    ``one_length``: whether all micro-batches of a step are of one length, as pipelines need.
    """

    batch: Batch
    phases: Sequence[StepSamples]
    one_length: bool = True

    def at(self, step: int, consumed: int) -> StepBatch:
        """The global batch of step ``step`` (0 is the first)."""
        begun = [phase for phase in self.phases if phase.first_step <= step]
        return StepBatch(begun[-1], consumed, self.batch.size(consumed), self.one_length)


class ValidationSamples(Protocol):
    """Samples by their numbers."""

    def __len__(self) -> int: ...

    def batch(self, numbers: Sequence[int], device: torch.device) -> ModelBatch:
        """Samples by their numbers; those past the last one are there, but do not count."""


@dataclass(frozen=True)
class ValidationData:
    """The first samples of every corpus, at most ``most`` of each, one corpus after another."""

    sources: Sequence[Samples]
    most: int
    objective: Objective

    def __len__(self) -> int:
        return sum(min(len(source), self.most) for source in self.sources)

    def batch(self, numbers: Sequence[int], device: torch.device) -> ModelBatch:
        """Samples by their numbers; those past the last one are there, but do not count."""
        present = [min(number, len(self) - 1) for number in numbers]
        windows = np.stack([self._window(number) for number in present])
        batch = self.objective.batch(windows, present, device)
        counts = torch.tensor([number < len(self) for number in numbers], device=device)
        return batch.counting(counts)

    def _window(self, number: int) -> np.ndarray:
        for source in self.sources:
            own = min(len(source), self.most)
            if number < own:
                return source.window(number)
            number -= own
        raise IndexError(number)
