"""Between groups of ranks that each are a world of their own: messages and tensors."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(days=7)
"""How long an end waits for the other, which may have much to do. One that is gone is noticed."""
NEAR, FAR = 0, 1
"""The rank at a bridge's near end, and the first of those at its far end."""


@dataclass(frozen=True)
class Seat:
    """A rank's place: its group, and its number among the ``ranks`` of that."""

    group: int
    rank: int
    ranks: int

    @classmethod
    def of(cls, rank: int, sizes: Sequence[int]) -> "Seat":
        """Of a rank among all, where groups of such sizes sit one behind another."""
        for group, size in enumerate(sizes):
            if rank < size:
                return cls(group, rank, size)
            rank -= size
        raise ValueError(f"no group of {list(sizes)} has that rank")


class Bridge:
    """From one rank, at the near end, to all ranks of a group, at the far end.

    What the near end tells, all of the far end hear; what these answer, the first of them says.
    Messages are pickled: both ends are processes of one run.

    Args:
        store: where both ends meet.
        rank: 0 is the near end; the far end's ranks follow.
        device: on which tensors are.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, device: str) -> None:
        self.rank = rank
        near = dist.PrefixStore("messages", store)
        self._messages: Any = dist.ProcessGroupGloo(near, rank, ranks, PATIENCE)
        self._tensors: Any = self._messages
        if device != "cpu":
            store = dist.PrefixStore("tensors", store)
            options = dist.ProcessGroupNCCL.Options()
            self._tensors = dist.ProcessGroupNCCL(store, rank, ranks, options)

    def tell(self, message: Any) -> None:
        """Near end: a message to the whole far end."""
        written = _bytes(message)
        self._broadcast(torch.tensor([written.numel()]))
        self._broadcast(written)

    def told(self) -> Any:
        """Far end: the next message; every rank waits for it."""
        size = torch.zeros(1, dtype=torch.int64)
        self._broadcast(size)
        written = torch.empty(int(size), dtype=torch.uint8)
        self._broadcast(written)
        return pickle.loads(written.numpy().tobytes())

    def reply(self, message: Any) -> None:
        """Far end: the first rank's answer."""
        written = _bytes(message)
        self._messages.send([torch.tensor([written.numel()])], NEAR, 0).wait()
        self._messages.send([written], NEAR, 0).wait()

    def replied(self) -> Any:
        """Near end: the next answer."""
        size = torch.zeros(1, dtype=torch.int64)
        self._messages.recv([size], FAR, 0).wait()
        written = torch.empty(int(size), dtype=torch.uint8)
        self._messages.recv([written], FAR, 0).wait()
        return pickle.loads(written.numpy().tobytes())

    def pass_on(self, tensor: Tensor) -> None:
        """Near end: sends a tensor. Far end: fills one of its shape and type."""
        self._tensors.broadcast([tensor]).wait()

    def _broadcast(self, tensor: Tensor) -> None:
        self._messages.broadcast([tensor]).wait()


def _bytes(message: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(message)), dtype=torch.uint8)
