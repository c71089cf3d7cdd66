"""What a task reads, brought to a node before it, and what it writes, sent to the run's URL."""

import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from llmscale.artifacts import RunFolder
from llmscale.clusters.base import Cluster, Job
from llmscale.clusters.failures import forget_failures
from llmscale.errors import LlmscaleError
from llmscale.mirror import Mirror

SECONDS_BETWEEN_PUSHES = 5.0
TIMES_A_PUSH = 10
"""A push is followed by a pause of so many times its duration, at least."""
FOLLOWED = ("logs", "metrics.jsonl", "progress.json", "tensorboard")
"""What of a stage others look at while it runs."""
WRITTEN_ANEW = ("hf", "progress.json")
"""What of its own folder a stage does not read."""


class Carrier:
    """A node's side of one start of a task, where the run is at a URL.

    Args:
        job: with the node's own cache as its run folder.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_up, daemon=True)

    def begin(self) -> None:
        """Fetches what the task reads; from then on, what others look at is sent now and then.

        Raises:
            StageError: if the storage cannot be reached, or refuses.
        """
        mirror, stage = self._mirror(), self._job.stage
        unread = [f"{part}/{name}" for part in self._job.reads for name in FOLLOWED]
        mirror.pull("recipe.yaml", "code", *self._job.reads, without=unread)
        mirror.pull(stage, without=[f"{stage}/{name}" for name in WRITTEN_ANEW])
        RunFolder(self._job.run_folder).stage(stage).logs.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def end(self) -> None:
        """Sends all that the task wrote here.

        Raises:
            StageError: if the storage cannot be reached, or refuses.
        """
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self._mirror().push(self._job.stage)

    def _mirror(self) -> Mirror:
        mirror = Mirror.of(self._job.run_folder)
        assert mirror is not None, "only a run at a URL has something to carry"
        return mirror

    def _keep_up(self) -> None:
        mirror, pause = Mirror.of(self._job.run_folder, patience_seconds=0), SECONDS_BETWEEN_PUSHES
        while mirror is not None and not self._over.wait(pause):
            begun = time.monotonic()
            with suppress(LlmscaleError, OSError):  # the next time, or at the end
                mirror.push(*(f"{self._job.stage}/{name}" for name in FOLLOWED))
            pause = max(SECONDS_BETWEEN_PUSHES, TIMES_A_PUSH * (time.monotonic() - begun))


@dataclass(frozen=True)
class CarryingCluster:
    """A cluster that is this machine alone, for runs at a URL."""

    cluster: Cluster

    def run(self, job: Job) -> None:
        """Runs the job between fetching what it reads and sending what it wrote."""
        folder = RunFolder(job.run_folder)
        forget_failures(folder.stage(job.stage))
        folder.push(job.stage)
        carrier = Carrier(job)
        carrier.begin()
        try:
            self.cluster.run(job)
        except BaseException:
            with suppress(LlmscaleError, OSError):  # the task's own error matters more
                carrier.end()
            raise
        carrier.end()
