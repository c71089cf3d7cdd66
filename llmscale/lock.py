"""The lock of a folder: one small file, ``.holder``, that tells who runs in it.

It relies on what NFS keeps too: a hard link is made once or not at all, a rename replaces in
one step, and times are the file server's. A record is taken away only by whoever put a *mark*
beside it, a file named after the record's random token: by its holder in the end, or by one
other that found the holder dead. So a record that was looked at cannot have become another's by
the time it is replaced. A mark is a record itself; one left by a killed process is taken over
in the same way.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path

from llmscale.errors import RecipeError
from llmscale.holder import Holder, has_ended, read

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
POLL_SECONDS = 0.01


def stop_own_process(line: str) -> None:
    """Asks the own process to save and stop."""
    with suppress(OSError):  # nobody may read it any more
        sys.stderr.write(line + "\n")
    os.kill(os.getpid(), signal.SIGTERM)


class FolderLock:
    """A folder's lock.

    Args:
        folder: what is locked; it exists.
        on_loss: called, in a thread and with one line that says so, when the lock that is held
            turns out to be another's or gone: this process was cut off from the file server
            for so long that it looked dead.
    """

    def __init__(self, folder: Path, on_loss: Callable[[str], None] = stop_own_process) -> None:
        self.folder = folder
        self.place = folder / ".holder"
        self._on_loss = on_loss

    def holder(self) -> Holder | None:
        """Who holds the lock now; None if nobody does."""
        seen = read(self.place)
        return None if seen is None or self._ended(*seen, Holder.current()) else seen[0]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the lock.

        Raises:
            RecipeError: if another process holds it.
            OSError: if the folder cannot be written, or its disk is full.
        """
        own, over = Holder.current(), threading.Event()
        heart = threading.Thread(target=self._beat, args=(own, over), daemon=True)
        try:
            self._take(own)
            heart.start()
            yield
        finally:
            over.set()
            if heart.is_alive():
                heart.join()
            self._release(own)

    def _take(self, own: Holder) -> None:
        beside = self.folder / f".holder.new.{own.token}"
        try:
            with beside.open("x", encoding="utf-8") as file:
                json.dump(asdict(own), file)
                file.flush()
                os.fsync(file.fileno())
            other = self._claim(self.place, beside, own)
        finally:
            with suppress(OSError):  # where it could not be written, that error is the cause
                beside.unlink(missing_ok=True)
        if other is not None:
            raise RecipeError(
                f"{self.folder}: {other} is running in this folder; "
                "wait for it, cancel it, or choose another --run-dir"
            )
        self._remove_leftovers(own)

    def _claim(self, place: Path, beside: Path, own: Holder) -> Holder | None:
        """Puts our record into a place; returns the living holder of it, if there is one."""
        while True:
            with suppress(FileExistsError):
                os.link(beside, place)
            # Whether the link was made only its content tells: NFS sends a request again when
            # the answer is lost, and then says that our own link exists.
            seen = read(place)
            if seen is None:
                time.sleep(POLL_SECONDS)  # it was released just now
                continue
            holder, beat = seen
            if holder == own:
                return None
            if not self._ended(holder, beat, own):
                return holder
            mark = _mark(place, holder)
            other = self._claim(mark, beside, own)
            if other is not None:
                return other
            # With the mark ours, this record is replaced by us or by nobody. It may have been
            # replaced before that, or its holder may have come back.
            again = read(place)
            if again is not None and again[0] == holder and self._ended(*again, own):
                with suppress(FileNotFoundError):  # we stood still and lost the mark
                    mark.replace(place)
            else:
                mark.unlink(missing_ok=True)

    def _release(self, own: Holder) -> None:
        """Removes the record if it is ours and nobody is about to take it over."""
        mark = _mark(self.place, own)
        with suppress(OSError):  # what stays behind counts no more once this process has ended
            if _is(self.place, own):
                os.link(self.place, mark)
                if _is(mark, own):
                    self.place.unlink()
                mark.unlink()

    def _beat(self, own: Holder, over: threading.Event) -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # the file server is away; it may come back
                if not _is(self.place, own):
                    other = self.holder() or "nobody"
                    self._on_loss(f"{self.folder}: {other} holds this folder now; stopping")
                    return
                os.utime(self.place)

    def _ended(self, holder: Holder, beat: float, reader: Holder) -> bool:
        return has_ended(holder, reader, lambda: _now(self.folder) - beat > STALE_SECONDS)

    def _remove_leftovers(self, own: Holder) -> None:
        """Removes what processes left that were killed while they took or gave up the lock."""
        for leftover in self.folder.glob(".holder.*"):
            with suppress(OSError):  # another user's may have to stay
                seen = read(leftover)
                if seen is not None and self._ended(*seen, own):
                    leftover.unlink(missing_ok=True)


def _mark(place: Path, holder: Holder) -> Path:
    return place.with_name(f"{place.name}.{holder.token}")


def _is(place: Path, holder: Holder) -> bool:
    seen = read(place)
    return seen is not None and seen[0] == holder


def _now(folder: Path) -> float:
    """The time by the file server's clock."""
    return time.monotonic() + _server_clock(folder)


@cache
def _server_clock(folder: Path) -> float:
    """The file server's clock less our monotonic one; asking needs a file, so it is done once.

    Where no file can be written, the local clock must do.
    """
    probe = folder / f".holder.clock.{os.urandom(8).hex()}"
    try:
        probe.touch()
        os.utime(probe)
        return probe.stat().st_mtime - time.monotonic()
    except OSError:
        return time.time() - time.monotonic()
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
