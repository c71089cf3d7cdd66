"""The critic: it expects what answers will be worth, and learns from what came of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from llmscale.rlhf.batches import Expected
from llmscale.rlhf.lesson import Lesson
from llmscale.rlhf.passes import values
from llmscale.rlhf.steps import dealt_answers, learned
from llmscale.training.engine import Engine, Stateful, Writing
from llmscale.training.rows import Rows


class Critic(Stateful, Protocol):
    """A model with a value at every place of a text; every method is collective."""

    def values(self, rows: Rows) -> Tensor:
        """What it expects at each place, ``[n, s]``."""

    def begin(self, expected: Expected, step: int, number: int) -> None:
        """Learns from all answers once; ``finish`` is to follow before anything else.

        Args:
            step: the iteration (0 is the first).
            number: of the pass.
        """

    def finish(self) -> dict[str, float]:
        """What is told of the last update.

        Raises:
            StageError: if an update was not finite; it was not applied.
        """


@dataclass
class OwnCritic:
    """A critic on the same ranks as who asks."""

    engine: Engine
    lesson: Lesson
    _told: dict[str, float] = field(default_factory=dict)

    def values(self, rows: Rows) -> Tensor:
        return values(self.engine, rows, self.lesson.batch.micro)

    def learn(self, expected: Expected, step: int, number: int) -> dict[str, float]:
        """Learns from all answers once; what is told of the last update."""
        clip, told = self.lesson.expectation.clip, {}
        for dealt in dealt_answers(self.lesson, self.engine, step, number):
            batches = [expected.batch(own, clip) for own in dealt]
            result = learned(self.lesson, self.engine, batches, step)
            told = {"value_loss": result.loss, **result.figures}
        return told

    def begin(self, expected: Expected, step: int, number: int) -> None:
        self._told = self.learn(expected, step, number)

    def finish(self) -> dict[str, float]:
        return self._told

    def writing(self, folder: Path) -> Writing:
        return self.engine.writing(folder)

    def load(self, folder: Path) -> None:
        self.engine.load(folder)
