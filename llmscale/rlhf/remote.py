"""Roles that other ranks play: the policy's ranks ask, and wait for the answer.

Shape legend: n answers, s places a row.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmscale.data.prompts import Prompt
from llmscale.errors import StageError
from llmscale.parallel.bridge import Bridge
from llmscale.rlhf.answers import Answer
from llmscale.rlhf.rollout import checksum
from llmscale.rlhf.scoring import Scores
from llmscale.training.rows import Rows


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
class Remote:
    """Another group of ranks, as the policy's ranks see it; every method is collective.

    Attributes:
        bridge: to the group; None on all of the policy's ranks but the first.
    """

    bridge: Bridge | None

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
        said = [self.bridge.replied() if self.bridge is not None else None]
        dist.broadcast_object_list(said, 0)
        if isinstance(said[0], Failure):
            raise StageError(said[0].reason)
        return said[0]

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
        there = Rows(*(column.cpu() for column in vars(rows).values()))
        found_ns: Tensor = self.remote.ask("log_probabilities", there, micro_batch)
        return found_ns.to(self.device)


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
