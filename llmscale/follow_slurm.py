"""Following a run's SLURM jobs from the terminal that submitted them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from llmscale.artifacts import RunFolder
from llmscale.clusters.base import Task
from llmscale.clusters.history import History
from llmscale.clusters.slurm import commands
from llmscale.clusters.slurm.commands import JobState
from llmscale.clusters.slurm.jobs import Submitted
from llmscale.display import ConsoleDisplay
from llmscale.errors import Interrupted, MachineError, StageError
from llmscale.recipe.recipe import Recipe
from llmscale.recipe.sweep import in_words
from llmscale.status import members
from llmscale.sweeps import require_no_failure

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BETWEEN_QUESTIONS = 5.0
ENDED = ("finished", "failed", "interrupted")
REASONS = {
    "PartitionNodeLimit": "it asks for more nodes than the partition has",
    "BadConstraints": "no node has what it asks for",
    "BeginTime": "it was requeued",
}


def follow(
    recipe: Recipe, folder: RunFolder, jobs: list[Submitted], display: ConsoleDisplay
) -> None:
    """Shows the jobs' progress until all have ended.

    Raises:
        StageError: if a stage failed.
        Interrupted: at Ctrl-C, which leaves the jobs as they are; or if the run was cancelled.
    """
    follower = _Follower(recipe, folder, jobs, display)
    try:
        follower.until_all_ended()
    except KeyboardInterrupt:
        raise Interrupted(
            f"the run goes on as job {', '.join(job.job for job in jobs)}; to come back, run the "
            f"same command, or llmscale logs {folder.path} --follow; to end it, llmscale cancel "
            f"{folder.path}"
        ) from None
    finally:
        display.stop()
    follower.require_finished()


@dataclass
class _Follower:
    recipe: Recipe
    folder: RunFolder
    jobs: list[Submitted]
    display: ConsoleDisplay
    told: set[str] = field(default_factory=set)
    happened: int = 0

    def until_all_ended(self) -> None:
        self.happened = len(History(self.folder.path).mishaps())
        while True:
            live = self._live()
            self._tell_what_happened()
            if live is not None:
                for job in self.jobs:
                    if job.array is not None:
                        self._look_at_members(job, live)
                    else:
                        self._look_at(job, live.get(job.job))
                if not live:
                    return
            deadline = time.monotonic() + SECONDS_BETWEEN_QUESTIONS
            while time.monotonic() < deadline:
                self.display.tick()
                time.sleep(SECONDS_BETWEEN_LOOKS)

    def _live(self) -> dict[str, JobState] | None:
        """The jobs that SLURM still has; None while it does not answer."""
        try:
            states = commands.job_states(job.job for job in self.jobs)
        except MachineError as error:
            line = f"{error}; asking again"
            self._once(line, lambda: self.display.note(line))
            return None
        return {job: state for job, state in states.items() if state.live}

    def _tasks(self, stage: str) -> tuple[Task, ...]:
        return self.recipe.stages[stage].tasks(self.recipe.cluster)

    def _look_at(self, job: Submitted, state: JobState | None) -> None:
        name = job.stage or ""
        if state is None:
            manifest = self.folder.stage(name).manifest()
            if job.task == self._tasks(name)[-1].name and manifest.get("status") == "finished":
                self._once(
                    f"{job.job} done",
                    lambda: self.display.stage_finished(name, manifest.get("metrics", {})),
                )
        elif state.waiting:
            self._tell_why_it_waits(f"{name}: job {job.job}", state)
        else:
            task = next(task for task in self._tasks(name) if task.name == job.task)
            self._once(
                f"{job.job} runs on {state.nodes}",
                lambda: self.display.stage_started(name, task.name, task.ranks),
            )

    def _look_at_members(self, job: Submitted, live: dict[str, JobState]) -> None:
        for name, state in live.items():
            if job.member_of(name) is not None and state.waiting:
                self._tell_why_it_waits(f"sweep: job {job.job}", state)
        rows = members(self.folder, self.recipe, live)
        done = sum(row["status"] == "finished" for row in rows)
        for row in rows:
            line = f"member {row['member']}: {in_words(row['values'])}: {row['status']}"
            if row["status"] == "running":
                self._once(line, partial(self.display.note, line))
            elif row["member"] in job.members and row["status"] in ENDED:
                told = f"{line}; {done} of {len(rows)} members are finished"
                self._once(line, partial(self.display.note, told))

    def _tell_why_it_waits(self, what: str, state: JobState) -> None:
        line = f"{what} waits: {REASONS.get(state.reason, state.reason)}"
        if state.reason not in ("", "Dependency"):
            self._once(line, lambda: self.display.note(line))

    def _once(self, what: str, tell: Callable[[], None]) -> None:
        if what not in self.told:
            self.told.add(what)
            tell()

    def _tell_what_happened(self) -> None:
        mishaps = History(self.folder.path).mishaps()
        for mishap in mishaps[self.happened :]:
            self.display.note(f"job {mishap['job']}: {mishap['outcome']}")
        self.happened = len(mishaps)

    def require_finished(self) -> None:
        for job in self.jobs:
            if job.array is not None:
                self._require_members(job)
                continue
            manifest = self.folder.stage(job.stage or "").manifest()
            status, error = manifest.get("status"), manifest.get("error")
            is_last = job.task == self._tasks(job.stage or "")[-1].name
            if status == "finished" or (status == "running" and not is_last):
                continue
            if status == "failed" and error:
                raise StageError(error)
            if status == "interrupted":
                raise Interrupted(f"{job.stage}: {error}; run the same command again to go on")
            raise StageError(f"{job.stage}: job {job.job} ended before its stage; see {job.log}")

    def _require_members(self, job: Submitted) -> None:
        rows = members(self.folder, self.recipe, {})
        require_no_failure(rows, {"sweep": rows})
        left = {row["member"]: row["status"] for row in rows if row["status"] != "finished"}
        left = {number: left[number] for number in job.members if number in left}
        if "interrupted" in left.values():
            numbers = ", ".join(left)
            raise Interrupted(f"members {numbers} are unfinished; run the same command to go on")
        if left:
            first = int(next(iter(left)))
            log = (job.log or "").replace("*", str(first))
            raise StageError(f"member {first:03d}: job {job.job}_{first} ended early; see {log}")
