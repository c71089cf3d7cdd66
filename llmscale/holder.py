"""Who holds a folder, as its record tells, and whether that process is gone."""

import errno
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

START_TOLERANCE_SECONDS = 2.0


@dataclass(frozen=True)
class Holder:
    """The process that runs in a folder."""

    host: str
    process: int
    started: float
    token: str
    processes: str = ""
    """The process ids' namespace: containers can share a host's name and not its processes."""
    job: str | None = None
    """The SLURM job, if it is part of one, and how often SLURM had requeued it."""
    restart: int = 0

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    @classmethod
    def current(cls) -> "Holder":
        """This process."""
        import psutil  # not at the top: 40 ms that the light commands would pay

        return cls(
            host=socket.gethostname(),
            process=os.getpid(),
            started=psutil.Process().create_time(),
            token=os.urandom(8).hex(),
            processes=_process_namespace(),
            job=os.environ.get("SLURM_JOB_ID"),
            restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        )

    def is_here(self) -> bool:
        """Whether this process could see the holder, and signal it."""
        return (self.host, self.processes) == (socket.gethostname(), _process_namespace())

    def is_alive(self) -> bool:
        """Whether the process runs; only for one that ``is_here``."""
        import psutil

        try:
            process = psutil.Process(self.process)
            same = abs(process.create_time() - self.started) <= START_TOLERANCE_SECONDS
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


UNREADABLE = Holder(host="an unknown host", process=0, started=0.0, token="unreadable")


def has_ended(holder: Holder, reader: Holder, silent: Callable[[], bool]) -> bool:
    """Whether a record's holder is gone, as ``reader`` sees it.

    Args:
        silent: whether its heartbeats stopped; asked only where nothing better is known.
    """
    if holder.job is not None and holder.job == reader.job and holder.restart < reader.restart:
        return True  # SLURM ended that start before it made ours
    if holder.is_here():
        return not holder.is_alive()
    return silent()


def read(place: Path, attempts: int = 3) -> tuple[Holder, float] | None:
    """A record and the time of its last heartbeat; None where there is none.

    It opens the file before it asks for the time: a time asked for by name may be a minute old
    in the memory of an NFS client, as old as what counts as dead.
    """
    try:
        with place.open("rb") as file:
            return _parse(file.read()), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ESTALE and attempts > 1:  # replaced while it was read
            return read(place, attempts - 1)
        raise


def _parse(record: bytes) -> Holder:
    try:
        holder = Holder(**json.loads(record))
        int(holder.token, 16)  # it becomes a part of a file's name
        return holder
    except (TypeError, ValueError):
        return UNREADABLE


@cache
def _process_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
