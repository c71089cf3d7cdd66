"""What a launcher does when it is asked to stop: once, it asks its ranks; twice, it ends them."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


def _nothing() -> None:
    pass


class Stops:
    """Handles SIGINT, SIGTERM and SIGUSR1 for as long as the context lasts.

    Attributes:
        asked: the signals received so far.
        ask: called at the first of them.
        end: called at each further one.
    """

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(
        self, ask: Callable[[], None] = _nothing, end: Callable[[], None] = _nothing
    ) -> None:
        self.asked: list[int] = []
        self.ask = ask
        self.end = end
        self._before: dict[int, Any] = {}

    def hold_back(self) -> None:
        """Keeps signals waiting, through an ``exec``, until the next context begins."""
        signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)

    @property
    def by_the_scheduler(self) -> bool:
        """Whether one was SIGUSR1: the time limit is near, or the job is preempted."""
        return signal.SIGUSR1 in self.asked

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self.asked.append(number)
        if len(self.asked) == 1:
            self.ask()
        else:
            self.end()

    def __enter__(self) -> "Stops":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._stop) for number in self.signals}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)
        return self

    def __exit__(
        self, _type: type | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextmanager
def deaf_to_sigterm() -> Iterator[None]:
    """Lets this process and those it starts meanwhile ignore SIGTERM."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
