"""Which rank failed first, and of what: not which rank noticed."""

import shutil
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmscale.artifacts import StageFolder, read_json, write_json
from llmscale.clusters.base import Job
from llmscale.errors import Interrupted, RecipeError, StageError

FULL_DISK_BYTES = 2**20
SIGNS_OF_ANOTHER_RANKS_DEATH = (
    "connection closed by peer",
    "connection reset",
    "connection refused",
    "broken pipe",
    "timed out",
    "nccl",
    "gloo",
    "socket",
    "store",
)

Kind = Literal["stopped", "own", "certain", "lost"]
"""How a rank ended: asked to stop; of its own error; of one that would come again; or because
another rank was gone."""


@dataclass(frozen=True)
class Failure:
    """Why a job failed.

    Attributes:
        line: the stage, the rank that failed by itself, its cause and its log, in one line.
        rank: that rank.
        certain: whether the same job would fail again in the same way.
        killed: whether the rank was killed from outside.
    """

    line: str
    rank: int
    certain: bool = False
    killed: bool = False


def forget_failures(folder: StageFolder) -> None:
    """Makes the folder for logs, without errors of a former start."""
    folder.logs.mkdir(parents=True, exist_ok=True)
    for old in folder.logs.glob("*.error.json"):
        old.unlink()


def record_failure(log_file: Path, error: BaseException) -> None:
    """Writes down how a rank ended, beside its log."""
    lines = str(error).strip().splitlines()
    cause = lines[0] if lines else type(error).__name__
    entry = {"time": time.time(), "cause": cause, "kind": _kind(error)}
    with suppress(OSError):
        write_json(log_file.with_suffix(".error.json"), entry)


def _kind(error: BaseException) -> Kind:
    if isinstance(error, Interrupted):
        return "stopped"
    if isinstance(error, RecipeError | StageError):
        return "certain"
    lost = isinstance(error, ConnectionError) or any(
        sign in str(error).lower() for sign in SIGNS_OF_ANOTHER_RANKS_DEATH
    )
    return "lost" if lost else "own"


def recorded(folder: StageFolder, rank: int) -> dict[str, Any] | None:
    """How a rank wrote that it ended; None if it ended well, or wrote nothing."""
    entry: dict[str, Any] | None = read_json(folder.log_file(rank).with_suffix(".error.json"))
    return entry


def first_cause(job: Job, folder: StageFolder, exit_codes: Mapping[int, int | None]) -> Failure:
    """The rank that failed by itself, and why.

    A rank killed by a signal leaves no error of its own; the others' errors of lost
    connections only point at it.

    Args:
        exit_codes: of each rank, the first that ended first; negative for a signal.
    """
    errors = {rank: entry for rank in exit_codes if (entry := recorded(folder, rank)) is not None}
    own = {rank: e for rank, e in errors.items() if e["kind"] in ("own", "certain")}
    lost = {rank: e for rank, e in errors.items() if e["kind"] == "lost"}
    killed = [
        r for r, code in exit_codes.items() if code is not None and code < 0 and r not in errors
    ]
    certain = False
    if own:
        rank = min(own, key=lambda r: own[r]["time"])
        cause, certain = own[rank]["cause"], own[rank]["kind"] == "certain"
    elif killed:
        rank = killed[0]
        name = signal.Signals(-int(exit_codes[rank] or 0)).name
        memory = " (out of memory?)" if name == "SIGKILL" else ""
        cause = f"killed by {name}{memory}"
    elif lost:
        rank = min(lost, key=lambda r: lost[r]["time"])
        cause = lost[rank]["cause"]
    else:
        rank = next((rank for rank, code in exit_codes.items() if code), next(iter(exit_codes)))
        cause = f"ended with exit code {exit_codes[rank]}"
    if shutil.disk_usage(folder.path).free < FULL_DISK_BYTES:
        cause, certain = "the disk is full; free space and run the same command again", True
    line = (
        f"{job.stage} ({job.task.name}): rank {rank} failed: {cause}; see {folder.log_file(rank)}"
    )
    return Failure(line, rank, certain, killed=not own and bool(killed))
