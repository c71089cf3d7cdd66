"""The models of an iteration, by their roles, and their common checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from llmscale.data.prompts import Prompt
from llmscale.rlhf.answers import Answer
from llmscale.rlhf.scoring import WeighedScorers
from llmscale.training.engine import Engine, Writing


class Rollout(Protocol):
    """A copy of the policy that answers prompts; every method is collective."""

    def synchronize(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Takes the policy's weights."""

    def answers(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> list[Answer]:
        """An answer to each prompt, sampled by its key; all of them on every rank."""


@dataclass(frozen=True)
class Roles:
    """Who takes part: the policy learns, a critic beside it if the algorithm has one.

    Attributes:
        reference: the model to start from; None where nothing is to stay near it.
        rollout: a copy of the policy that answers.
        scorers: what says how good answers are.
    """

    policy: Engine
    critic: Engine | None
    reference: Engine | None
    rollout: Rollout
    scorers: WeighedScorers

    def trained(self) -> dict[str, Engine]:
        """Those that learn, by their folders in a checkpoint."""
        found = {"policy": self.policy, "critic": self.critic}
        return {name: engine for name, engine in found.items() if engine is not None}

    def writing(self, folder: Path) -> "RolesWriting":
        """Takes a copy of the state of all that learn; collective."""
        return RolesWriting(self.trained(), folder)

    def load(self, folder: Path) -> None:
        """Restores all that learn; collective."""
        for name, engine in self.trained().items():
            engine.load(folder / name)


class RolesWriting:
    """Copies of several engines' states, each on its way into a folder of its own."""

    def __init__(self, engines: Mapping[str, Engine], folder: Path) -> None:
        self._parts: list[Writing] = []
        for name, engine in engines.items():
            (folder / name).mkdir(exist_ok=True)
            self._parts.append(engine.writing(folder / name))

    def write(self) -> None:
        """Writes this rank's files; may be called in a thread."""
        for part in self._parts:
            part.write()

    def files(self) -> list[Path]:
        """What this rank has written."""
        return [file for part in self._parts for file in part.files()]

    def finish(self) -> None:
        """Writes what the files have in common; collective."""
        for part in self._parts:
            part.finish()
