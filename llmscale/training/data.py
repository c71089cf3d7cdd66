"""The samples of each step, and those of validation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from llmscale.data.blend import Blend
from llmscale.data.samples import Samples
from llmscale.training.batches import ModelBatch
from llmscale.training.curriculum import PlacedPhase
from llmscale.training.objectives import Objective
from llmscale.training.settings import Batch


@dataclass(frozen=True)
class PhaseSamples:
    """The samples of one phase: its corpora in turn, each in its own shuffled order."""

    phase: PlacedPhase
    sources: Mapping[str, Samples]
    objective: Objective

    @cached_property
    def _blend(self) -> Blend:
        return Blend(self.phase.weights)

    def _find(self, place: int) -> tuple[str, int]:
        """The corpus and the sample's number in it, at a place of the whole run's order."""
        corpus, before = self._blend.place(place - self.phase.first_sample)
        return corpus, self.sources[corpus].number_at(self.phase.read.get(corpus, 0) + before)

    def batch(self, places: Sequence[int], device: torch.device) -> ModelBatch:
        """The samples at these places of the run's order, and what is to be predicted."""
        found = [self._find(place) for place in places]
        windows = [self.sources[corpus].window(number) for corpus, number in found]
        return self.objective.batch(np.stack(windows), places, device)

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
        return self.samples.phase.sequence_length

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
        begun = [phase for phase in self.phases if phase.phase.first_step <= step]
        return StepBatch(begun[-1], consumed, self.batch.size(consumed))


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
