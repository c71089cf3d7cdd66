"""Which rank failed first, and of what: not which rank noticed."""

import shutil
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from llmscale.artifacts import StageFolder, read_json, write_json
from llmscale.clusters.base import Job

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


def record_failure(log_file: Path, error: BaseException) -> None:
    """Writes down a rank's own error beside its log."""
    lines = str(error).strip().splitlines()
    cause = lines[0] if lines else type(error).__name__
    secondary = any(sign in str(error).lower() for sign in SIGNS_OF_ANOTHER_RANKS_DEATH)
    entry = {"time": time.time(), "cause": cause, "secondary": secondary}
    with suppress(OSError):
        write_json(log_file.with_suffix(".error.json"), entry)


def first_cause(job: Job, folder: StageFolder, exit_codes: Mapping[int, int | None]) -> str:
    """One line that names the stage, the rank that failed by itself, why, and its log.

    A rank killed by a signal leaves no error of its own; the others' errors of lost
    connections only point at it.
    """
    errors = {
        rank: read_json(folder.log_file(rank).with_suffix(".error.json")) for rank in exit_codes
    }
    own = {rank: e for rank, e in errors.items() if e is not None and not e["secondary"]}
    killed = [rank for rank, code in exit_codes.items() if code is not None and code < 0]
    others = {rank: e for rank, e in errors.items() if e is not None and e["secondary"]}
    if own:
        rank = min(own, key=lambda r: own[r]["time"])
        cause = own[rank]["cause"]
    elif killed:
        rank = killed[0]
        name = signal.Signals(-int(exit_codes[rank] or 0)).name
        memory = " (out of memory?)" if name == "SIGKILL" else ""
        cause = f"killed by {name}{memory}"
    elif others:
        rank = min(others, key=lambda r: others[r]["time"])
        cause = others[rank]["cause"]
    else:
        rank = next(rank for rank, code in exit_codes.items() if code)
        cause = f"ended with exit code {exit_codes[rank]}"
    if shutil.disk_usage(folder.path).free < FULL_DISK_BYTES:
        cause = "the disk is full; free space and run the same command again"
    where = f"{job.stage} ({job.task.name})"
    return f"{where}: rank {rank} failed: {cause}; see {folder.log_file(rank)}"
