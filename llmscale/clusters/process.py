"""What a rank's process does around its work, whoever started it."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from llmscale.artifacts import now
from llmscale.clusters.base import Job
from llmscale.clusters.failures import record_failure
from llmscale.errors import Interrupted, LlmscaleError

Entry = Callable[[Job, int, str], None]
"""What a rank runs, given its job, its number and the rendezvous."""


def run_as_rank(entry: Entry, job: Job, rank: int, rendezvous: str, log_file: Path) -> int:
    """Runs a rank: its output to its log, its error on record; returns its exit code.

    The code is 0 if the rank did its work, 130 if it was asked to stop and did, else 1.
    """
    _send_output_to(log_file)
    print(f"--- {now()} {job.task.name}: rank {rank} of {job.task.ranks}, process {os.getpid()}")
    code = 0
    try:
        entry(job, rank, rendezvous)
    except Interrupted as stop:
        print(stop)
        record_failure(log_file, stop)
        code = Interrupted.exit_code
    except BaseException as error:
        if isinstance(error, LlmscaleError):
            print(error)
        else:
            traceback.print_exc()
        record_failure(log_file, error)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _send_output_to(log_file: Path) -> None:
    with log_file.open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
