"""Stopping at a step's end: SIGTERM and SIGUSR1 ask, and all ranks agree."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist


class StopRequest:
    """Whether any rank was asked to stop."""

    def __init__(self) -> None:
        self._asked = False
        self.granted = False
        """Whether all ranks have agreed to stop."""

    def ask(self, _signal: int, _frame: FrameType | None) -> None:
        """A signal handler."""
        self._asked = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked; collective, so that all stop after the same step."""
        asked = torch.tensor([float(self._asked)], device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        self.granted = bool(asked.item())
        return self.granted


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Handles the stop signals for as long as the context lasts.

    After it, a rank that stops is deaf to them: who asks again must not end it before it has
    said that it stopped.
    """
    request = StopRequest()
    signals = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, request.ask) for number in signals}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if request.granted else handler)
