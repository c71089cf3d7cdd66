"""Roles that other ranks play: the policy's ranks ask, and wait for the answer.

Shape legend: n answers, s places a row.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmscale.data.prompts import Prompt
from llmscale.errors import StageError
from llmscale.parallel.bridge import Bridge
from llmscale.rlhf.answers import Answer
from llmscale.rlhf.batches import Expected
from llmscale.rlhf.rollout import checksum
from llmscale.rlhf.scoring import Scores
from llmscale.training.engine import Writing
from llmscale.training.rows import Rows

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Request:
    """What other ranks are to do."""

    task: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why they could not."""

    reason: str


@dataclass(frozen=True)
class Reply:
    """What has come of a request, and how long the group waited for that before."""

    answer: Any
    waited_seconds: float


@dataclass
class Remote:
    """Another group of ranks, as the policy's ranks see it; every method is collective.

    Attributes:
        bridge: to the group; None on all of the policy's ranks but the first.
        waited_seconds: how long the group has waited for requests.
        awaited_seconds: how long the policy's ranks have waited for the group.
    """

    bridge: Bridge | None
    waited_seconds: float = 0.0
    awaited_seconds: float = 0.0

    def ask(self, task: str, *arguments: Any) -> Any:
        """Has something done, and waits for what comes of it.

        Raises:
            StageError: as the other ranks say.
        """
        self.begin(task, *arguments)
        return self.finish()

    def begin(self, task: str, *arguments: Any) -> None:
        """Has something done without waiting; ``finish`` is to follow before anything else."""
        if self.bridge is not None:
            self.bridge.tell(Request(task, arguments))

    def finish(self) -> Any:
        """What has come of what was begun, on every rank.

        Raises:
            StageError: as the other ranks say.
        """
        begun = time.perf_counter()
        said: list[Any] = [self.bridge.replied() if self.bridge is not None else None]
        dist.broadcast_object_list(said, 0)
        reply: Reply = said[0]
        self.waited_seconds += reply.waited_seconds
        self.awaited_seconds += time.perf_counter() - begun
        if isinstance(reply.answer, Failure):
            raise StageError(reply.answer.reason)
        return reply.answer

    def end(self, reason: str | None) -> None:
        """Tells the other ranks to end; ``reason`` says why, if it is before the time."""
        if self.bridge is not None:
            self.bridge.tell(Request("end", (reason,)))


@dataclass(frozen=True)
class RemoteRollout:
    """A copy of the policy that other ranks have."""

    remote: Remote

    def synchronize(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Sends the policy's weights, one at a time, without a file.

        Raises:
            StageError: if what has arrived is not what was sent.
        """
        bridge, sent = self.remote.bridge, hashlib.blake2b()
        self.remote.begin("synchronize")
        for name, weight in weights:
            if bridge is not None:
                plain = weight.detach().contiguous()
                bridge.tell((name, tuple(plain.shape), plain.dtype))
                bridge.pass_on(plain)
                sent.update(name.encode() + checksum(plain))
        if bridge is not None:
            bridge.tell(sent.hexdigest())
        self.remote.finish()

    def answers(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> list[Answer]:
        """An answer to each prompt, sampled by its key."""
        self.begin(prompts, keys)
        return self.finish()

    def begin(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> None:
        """Has prompts answered by the weights sent last, while the policy goes on learning."""
        self.remote.begin("answers", prompts, keys)

    def finish(self) -> list[Answer]:
        """The answers that were begun."""
        found: list[Answer] = self.remote.finish()
        return found


@dataclass(frozen=True)
class RemoteReference:
    """The model to start from, which other ranks have."""

    remote: Remote
    device: torch.device

    def log_probabilities(self, rows: Rows, micro_batch: int) -> Tensor:
        """Of the token that follows each place, ``[n, s]``."""
        found_ns: Tensor = self.remote.ask("log_probabilities", rows.to(CPU), micro_batch)
        return found_ns.to(self.device)


@dataclass(frozen=True)
class RemoteCritic:
    """A critic that other ranks have: it learns while the policy does."""

    remote: Remote
    device: torch.device

    def values(self, rows: Rows) -> Tensor:
        """What it expects at each place, ``[n, s]``."""
        found_ns: Tensor = self.remote.ask("values", rows.to(CPU))
        return found_ns.to(self.device)

    def begin(self, expected: Expected, step: int, number: int) -> None:
        """Has it learn from all answers once."""
        self.remote.begin("learn", expected.to(CPU), step, number)

    def finish(self) -> dict[str, float]:
        """What is told of the last update."""
        told: dict[str, float] = self.remote.finish()
        return told

    def writing(self, folder: Path) -> Writing:
        """Has it write its state, and waits for that."""
        return WrittenElsewhere(self.remote.ask("write", folder))

    def load(self, folder: Path) -> None:
        """Has it restore its state."""
        self.remote.ask("load", folder)


@dataclass(frozen=True)
class WrittenElsewhere(Writing):
    """A part of a checkpoint that other ranks have written, with its files' checksums."""

    checksums: Mapping[str, str]

    def write(self) -> None:
        """All is written."""

    def files(self) -> list[Path]:
        """None of this rank's."""
        return []

    def elsewhere(self) -> Mapping[str, str]:
        """The checksums by the files' names in the checkpoint."""
        return self.checksums

    def finish(self) -> None:
        """Nothing is left to do."""


@dataclass(frozen=True)
class RemoteScorers:
    """What says how good answers are, on other ranks."""

    remote: Remote

    def scores(self, answers: Sequence[Answer]) -> Scores:
        """What each is worth."""
        found: Scores = self.remote.ask("scores", answers)
        return found


def sent_weights(bridge: Bridge, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The far end of ``RemoteRollout.synchronize``.

    Raises:
        StageError: if what has arrived is not what was sent.
    """
    arrived = hashlib.blake2b()
    while not isinstance(told := bridge.told(), str):
        name, shape, dtype = told
        weight = torch.empty(shape, dtype=dtype, device=device)
        bridge.pass_on(weight)
        arrived.update(name.encode() + checksum(weight))
        yield name, weight
    if told != arrived.hexdigest():
        raise StageError("the policy's weights have changed on the way to the rollout")
