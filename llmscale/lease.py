"""The lock of a run at a URL: small numbered objects, of which the highest counts.

An object store can create an object that is not there, and refuses where it is. So to take the
lock is to create the next number: of two that try, one wins. Its holder writes the object again
and again, and says in it when it lets go. A silent holder's lock is taken by the next number,
which the holder sees when it comes back. No clock of another machine is asked.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from llmscale.errors import LlmscaleError, MachineError, RecipeError, StageError
from llmscale.holder import Holder, has_ended
from llmscale.lock import stop_own_process
from llmscale.storage import Storage

FOLDER = ".lock"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
POLL_SECONDS = 2.0


class Lease:
    """The lock of a URL.

    Args:
        on_loss: called, in a thread and with one line that says so, when another has taken it.
        say: told that a holder is waited for.
        stale_seconds: after so long without a sign a holder elsewhere counts as dead.
    """

    def __init__(
        self,
        url: str,
        say: Callable[[str], None],
        on_loss: Callable[[str], None] = stop_own_process,
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        self._storage = Storage(url)
        self._impatient = Storage(url, patience_seconds=0)
        self._say, self._on_loss, self._stale_seconds = say, on_loss, stale_seconds
        self._number = 0

    def holder(self) -> Holder | None:
        """Who holds the lock now, as far as its record and this machine's clock tell."""
        _, record = self._newest()
        if record is None or record.get("released"):
            return None
        holder, own = _holder(record), Holder.current()
        silent = time.time() - record["renewed"] > self._stale_seconds
        return None if has_ended(holder, own, lambda: silent) else holder

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the lock.

        Raises:
            RecipeError: if another process holds it.
            MachineError: if the storage cannot be reached, or refuses.
        """
        own, over = Holder.current(), threading.Event()
        try:
            self._take(own)
        except StageError as error:
            raise MachineError(str(error)) from None
        heart = threading.Thread(target=self._beat, args=(own, over), daemon=True)
        heart.start()
        try:
            yield
        finally:
            over.set()
            heart.join()
            with suppress(LlmscaleError):  # it counts no more once this process has ended
                self._impatient.write(_name(self._number), _record(own, released=True))

    def _take(self, own: Holder) -> None:
        while True:
            number, record = self._newest()
            if record is not None and not record.get("released"):
                other = _holder(record)
                if not has_ended(other, own, lambda: self._silent(number, record)):  # noqa: B023
                    raise RecipeError(
                        f"{self._storage.url}: {other} is running in this folder; wait for it, "
                        "cancel it, or choose another --run-dir"
                    )
            self._number = number + 1
            if self._storage.create(_name(self._number), _record(own)):
                older = [name for name in self._storage.versions(FOLDER) if _number(name) <= number]
                self._storage.remove(older)
                return

    def _silent(self, number: int, record: dict[str, Any]) -> bool:
        """Whether a holder gives no sign for long, waited for."""
        self._say(
            f"{self._storage.url}: {_holder(record)} has not let go of this folder; waiting up to "
            f"{self._stale_seconds:.0f} s for a sign of it"
        )
        end = time.monotonic() + self._stale_seconds
        while time.monotonic() < end:
            time.sleep(min(POLL_SECONDS, self._stale_seconds / 5))
            if self._newest() != (number, record):
                return False
        return True

    def _newest(self) -> tuple[int, dict[str, Any] | None]:
        """The lock's number and record; 0 and None where nobody has ever held it."""
        while True:
            number = max(map(_number, self._storage.versions(FOLDER)), default=0)
            content = self._storage.read(_name(number)) if number else None
            if number == 0 or content is not None:
                return number, None if content is None else json.loads(content)

    def _beat(self, own: Holder, over: threading.Event) -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            with suppress(LlmscaleError):  # the storage is away; it may come back
                newest = max(map(_number, self._impatient.versions(FOLDER)), default=0)
                if newest > self._number:
                    self._on_loss(f"{self._storage.url}: another run holds this folder; stopping")
                    return
                self._impatient.write(_name(self._number), _record(own))


def _name(number: int) -> str:
    return f"{FOLDER}/{number:08d}.json"


def _number(name: str) -> int:
    digits = name.rpartition("/")[2].removesuffix(".json")
    return int(digits) if digits.isdigit() else 0


def _record(holder: Holder, released: bool = False) -> bytes:
    told = {"holder": asdict(holder), "renewed": time.time(), "released": released}
    return json.dumps(told).encode()


def _holder(record: dict[str, Any]) -> Holder:
    return Holder(**record["holder"])
