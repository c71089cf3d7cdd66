"""Waiting for what a task's ranks need on a Ray cluster."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup

from llmscale.clusters.base import Job
from llmscale.clusters.ray.seats import asked_for, bundle, in_words, wait_for, what_is_there
from llmscale.clusters.ray.settings import RaySettings
from llmscale.clusters.stops import Stops
from llmscale.errors import MachineError

SECONDS_BEFORE_SAYING = 2.0
SECONDS_FOR_ALL = 20.0
"""How long elastic training waits for all its ranks before it goes on with fewer."""
SECONDS_FOR_FEWER = 2.0


@dataclass(frozen=True)
class Reservations:
    """Asks a cluster for placement groups.

    Attributes:
        device: the recipe's; ``auto`` is a GPU for each rank, if the cluster has any.
        stops: what this process was asked meanwhile.
        on_tick: called some times a second while it waits.
        say: told, in a line, what is waited for.
    """

    settings: RaySettings
    device: str
    stops: Stops
    on_tick: Callable[[], None]
    say: Callable[[str], None]

    @contextmanager
    def reserved(self, job: Job) -> Iterator[tuple[PlacementGroup, int] | None]:
        """Resources for all ranks of a task, or for fewer where that is allowed; and how many.

        None if the run was asked to stop.

        Raises:
            MachineError: if there are none in time.
        """
        name, each = _name(job), self._each(job)
        sizes = (job.task.ranks, *(job.task.fewer if self.settings.elastic else ()))
        patience = self._patience(name, job.task.ranks, each)
        seconds = SECONDS_FOR_ALL if len(sizes) > 1 else math.inf
        while patience():
            for ranks in sizes:
                with self.asked_for(job, ranks) as group:
                    if wait_for(group, _at_most(seconds, patience)):
                        yield group, ranks
                        return
                seconds = SECONDS_FOR_FEWER
        if not self.stops.asked:
            raise MachineError(
                f"{name}: asks for {in_words(job.task.ranks, each)} ({self.settings.placement}), "
                f"and {what_is_there(each)}, after {self.settings.wait_seconds} s; add nodes, "
                "ask for less, or wait longer by cluster.ray.wait_seconds"
            )
        yield None

    def _each(self, job: Job) -> dict[str, float]:
        gpus = self.device == "cuda" or (
            self.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0
        )
        return bundle(self.settings.cpus_per_rank, gpus and job.task.on_device)

    def asked_for(self, job: Job, ranks: int) -> AbstractContextManager[PlacementGroup]:
        """A placement group for some ranks of a task, which may have to be waited for."""
        return asked_for(_name(job), [self._each(job)] * ranks, self.settings.placement)

    def _patience(self, name: str, ranks: int, each: dict[str, float]) -> Callable[[], bool]:
        """Whether to go on waiting for resources: asked some times a second."""
        begun, told = time.monotonic(), False

        def keep_waiting() -> bool:
            nonlocal told
            self.on_tick()
            waited = time.monotonic() - begun
            if waited > SECONDS_BEFORE_SAYING and not told:
                told = True
                self.say(
                    f"{name}: waiting up to {self.settings.wait_seconds} s for "
                    f"{in_words(ranks, each)} ({self.settings.placement}); {what_is_there(each)}"
                )
            return waited < self.settings.wait_seconds and not self.stops.asked

        return keep_waiting


def _name(job: Job) -> str:
    return f"{job.stage}.{job.task.name}"


def _at_most(seconds: float, keep_waiting: Callable[[], bool]) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: keep_waiting() and time.monotonic() < end
