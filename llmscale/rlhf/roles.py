"""The models of an iteration, by their roles, and their common checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from llmscale.data.prompts import Prompt
from llmscale.rlhf.answers import Answer
from llmscale.rlhf.critics import Critic
from llmscale.rlhf.early import EarlyAnswers
from llmscale.rlhf.passes import log_probabilities
from llmscale.rlhf.remote import Remote
from llmscale.rlhf.scoring import Scores
from llmscale.training.engine import Engine, Stateful, Writing
from llmscale.training.rows import Rows


class Rollout(Protocol):
    """A copy of the policy that answers prompts; every method is collective."""

    def synchronize(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Takes the policy's weights."""

    def answers(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> list[Answer]:
        """An answer to each prompt, sampled by its key; all of them on every rank."""


class Reference(Protocol):
    """The model to start from."""

    def log_probabilities(self, rows: Rows, micro_batch: int) -> Tensor:
        """Of the token that follows each place, ``[n, s]``; collective."""


class Scorers(Protocol):
    """What says how good answers are."""

    def scores(self, answers: Sequence[Answer]) -> Scores:
        """What each is worth, the same on every rank; collective."""


@dataclass(frozen=True)
class OwnReference:
    """The reference on the same ranks as who asks."""

    engine: Engine

    def log_probabilities(self, rows: Rows, micro_batch: int) -> Tensor:
        """Of the token that follows each place, ``[n, s]``; collective."""
        return log_probabilities(self.engine, rows, micro_batch)


@dataclass(frozen=True)
class Roles:
    """Who takes part: the policy learns, a critic beside it if the algorithm has one.

    Attributes:
        reference: None where nothing is to stay near it.
        early: answers to the next iteration's prompts, where they are begun ahead.
        groups: the ranks beside the policy's, by name.
    """

    policy: Engine
    critic: Critic | None
    reference: Reference | None
    rollout: Rollout
    scorers: Scorers
    early: EarlyAnswers | None = None
    groups: Mapping[str, Remote] = field(default_factory=dict)

    def waits(self) -> dict[str, float]:
        """Since the last call, how long each group waited for work, and the policy for them."""
        told, policy = {}, 0.0
        for name, group in self.groups.items():
            told[f"waiting_seconds_{name}"] = round(group.waited_seconds, 4)
            policy += group.awaited_seconds
            group.waited_seconds = group.awaited_seconds = 0.0
        return told | {"waiting_seconds_policy": round(policy, 4)} if told else {}

    def trained(self) -> dict[str, Stateful]:
        """Those that learn, by their folders in a checkpoint."""
        found: dict[str, Stateful | None] = {"policy": self.policy, "critic": self.critic}
        return {name: each for name, each in found.items() if each is not None}

    def writing(self, folder: Path) -> "RolesWriting":
        """Takes a copy of the state of all that learn; collective."""
        return RolesWriting(self.trained(), self.early, folder)

    def load(self, folder: Path) -> None:
        """Restores all that learn; collective."""
        for name, each in self.trained().items():
            each.load(folder / name)
        if self.early is not None:
            self.early.load(folder)


class RolesWriting(Writing):
    """Copies of the states of all that learn, each on its way into a folder of its own.

    Beside them, by the first rank, answers that wait to be learned from.
    """

    def __init__(
        self, trained: Mapping[str, Stateful], early: EarlyAnswers | None, folder: Path
    ) -> None:
        self._parts: list[Writing] = []
        for name, each in trained.items():
            (folder / name).mkdir(exist_ok=True)
            self._parts.append(each.writing(folder / name))
        if early is not None and dist.get_rank() == 0:
            self._parts.append(early.writing(folder))

    def write(self) -> None:
        """Writes this rank's files; may be called in a thread."""
        for part in self._parts:
            part.write()

    def files(self) -> list[Path]:
        """What this rank has written."""
        return [file for part in self._parts for file in part.files()]

    def elsewhere(self) -> dict[str, str]:
        """Checksums of what others have written, by names in the checkpoint."""
        return {name: value for part in self._parts for name, value in part.elsewhere().items()}

    def finish(self) -> None:
        """Writes what the files have in common; collective."""
        for part in self._parts:
            part.finish()
