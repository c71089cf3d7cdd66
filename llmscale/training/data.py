"""The samples of each step, and those of validation.

Shape legend: b samples, s tokens of text a sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llmscale.data.blend import Blend
from llmscale.data.samples import Samples
from llmscale.training.curriculum import Span
from llmscale.training.settings import Batch


@dataclass(frozen=True)
class PhaseSamples:
    """The samples of one phase: its corpora in turn, each in its own shuffled order."""

    span: Span
    sources: Mapping[str, Samples]

    @cached_property
    def _blend(self) -> Blend:
        return Blend(self.span.weights)

    def _find(self, place: int) -> tuple[str, int]:
        """The corpus and the sample's number in it, at a place of the whole run's order."""
        corpus, before = self._blend.place(place - self.span.first_sample)
        return corpus, self.sources[corpus].number_at(self.span.read.get(corpus, 0) + before)

    def windows(self, places: Sequence[int]) -> np.ndarray:
        """The samples at these places of the run's order: ``[b, s + 1]``."""
        found = [self._find(place) for place in places]
        return np.stack([self.sources[corpus].window(number) for corpus, number in found])

    def name(self, place: int) -> str:
        """A sample as a log's line names it: its number, after its corpus if there are several."""
        corpus, number = self._find(place)
        return f"{corpus} {number}" if len(self.sources) > 1 else str(number)


@dataclass(frozen=True)
class StepBatch:
    """One step's global batch: ``size`` samples from place ``first`` of the run's order on."""

    samples: PhaseSamples
    first: int
    size: int

    @property
    def places(self) -> range:
        """The places of its samples."""
        return range(self.first, self.first + self.size)

    @property
    def sequence_length(self) -> int:
        """The model's tokens a sample."""
        return self.samples.span.sequence_length

    @property
    def tokens(self) -> int:
        """Tokens of text it reads, whether they are predicted or not."""
        return self.size * next(iter(self.samples.sources.values())).sequence_length


@dataclass(frozen=True)
class TrainingData:
    """What every step trains on: a function of its number and of the samples before it."""

    batch: Batch
    phases: Sequence[PhaseSamples]

    def at(self, step: int, consumed: int) -> StepBatch:
        """The global batch of step ``step`` (0 is the first)."""
        begun = [phase for phase in self.phases if phase.span.first_step <= step]
        return StepBatch(begun[-1], consumed, self.batch.size(consumed))


@dataclass(frozen=True)
class ValidationData:
    """The first samples of every corpus, at most ``most`` of each, one corpus after another."""

    sources: Sequence[Samples]
    most: int

    def __len__(self) -> int:
        return sum(min(len(source), self.most) for source in self.sources)

    def window(self, number: int) -> np.ndarray:
        """Sample ``number``: ``[s + 1]``."""
        for source in self.sources:
            own = min(len(source), self.most)
            if number < own:
                return source.window(number)
            number -= own
        raise IndexError(number)
