"""A forward pass that pauses on its way, so that what comes next can change first."""

from collections.abc import Callable
from typing import Any

import greenlet


class PausedPass:
    """A function that stops wherever it calls ``pause``, and goes on when it is told to."""

    def __init__(self, forward: Callable[[], Any]) -> None:
        self.result: Any = None
        self._forward = forward
        self._own = greenlet.greenlet(self._run)

    def go_on(self) -> Any:
        """What the pass gave to its next pause, or None at its end."""
        return self._own.switch()

    def close(self) -> None:
        """Ends the pass wherever it is."""
        if not self._own.dead:
            self._own.throw(greenlet.GreenletExit)

    def _run(self) -> None:
        self.result = self._forward()


def pause(given: Any) -> None:
    """Gives something to who runs this pass, and waits until it is to go on."""
    greenlet.getcurrent().parent.switch(given)
