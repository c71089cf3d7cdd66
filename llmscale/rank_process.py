"""A rank's process under srun, torchrun or Ray: it knows its number from its environment."""

import os
import signal
import sys
import threading
from types import FrameType

from llmscale.artifacts import RunFolder
from llmscale.clusters.base import Job
from llmscale.clusters.process import run_as_rank
from llmscale.errors import Interrupted
from llmscale.parallel.exchange import RANK_VARIABLE
from llmscale.rank import run_rank


def main() -> None:
    """Runs this rank of the job that the first argument describes."""
    job = Job.from_json(sys.argv[1])
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _stop_at_once)
    if RANK_VARIABLE in os.environ:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        rank, rendezvous = int(os.environ[RANK_VARIABLE]), "launcher://"
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        rank, rendezvous = int(os.environ["RANK"]), "env://"
    else:
        rank, rendezvous = int(os.environ["SLURM_PROCID"]), "launcher://"
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ["LOCAL_WORLD_SIZE"] = str(job.task.ranks // job.task.nodes)
    if job.task.nodes == 1 and RANK_VARIABLE not in os.environ:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    log_file = RunFolder(job.run_folder).stage(job.stage).log_file(rank)
    code = run_as_rank(run_rank, job, rank, rendezvous, log_file)
    # that a rank was asked to stop is on record; as an exit code it would end the others
    os._exit(0 if code == Interrupted.exit_code else code)


def _end_with_parent() -> None:
    """Ends this rank at once if its parent dies, however it died: its end of the pipe closes."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _stop_at_once(_number: int, _frame: FrameType | None) -> None:
    """While there is nothing to save: ends this rank, and by that the step."""
    os._exit(Interrupted.exit_code)


if __name__ == "__main__":
    main()
