"""The jobs of a run: submitted once, and known by the run folder from then on."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ClusterShell.RangeSet import RangeSet

from llmscale.artifacts import RunFolder, now, read_json, write_json
from llmscale.clusters.base import ClusterSettings, Job, Task
from llmscale.clusters.history import History
from llmscale.clusters.slurm import commands
from llmscale.clusters.slurm.commands import JobState
from llmscale.clusters.slurm.script import MEMBER, BatchJob


@dataclass(frozen=True)
class Submitted:
    """A job of a run that SLURM was given.

    Attributes:
        job: SLURM's id.
        stage: whose task it runs; None for all stages of the recipe.
        task: the task.
        log: what its launcher says.
        array: the numbers of a sweep's members that an array of jobs runs.
    """

    job: str
    stage: str | None
    task: str | None
    submitted: str
    log: str | None = None
    array: str | None = None

    @property
    def members(self) -> list[str]:
        """The numbers of the members, as their folders are named."""
        numbers = RangeSet(self.array) if self.array else ()
        return [f"{int(number):03d}" for number in numbers]

    def member_of(self, job: str) -> str | None:
        """Which member a job of the array runs; None if it is not of this array."""
        array, _, number = job.partition("_")
        return f"{int(number):03d}" if array == self.job and number.isdecimal() else None


def submitted_jobs(folder: RunFolder) -> list[Submitted]:
    """The jobs of the run's last submission, in order."""
    return [Submitted(**entry) for entry in read_json(_file(folder)) or []]


def _file(folder: RunFolder) -> Path:
    return folder.path / "slurm" / "jobs.json"


def live_jobs(folder: RunFolder) -> dict[str, JobState]:
    """The run's jobs that SLURM still has, by id.

    Raises:
        MachineError: if SLURM does not answer.
    """
    states = commands.job_states(entry.job for entry in submitted_jobs(folder))
    return {job: state for job, state in states.items() if state.live}


def note_own_job(folder: RunFolder, job: str) -> None:
    """Makes the job that this process leads known as the run's only one."""
    _note(folder, [Submitted(job, None, None, now())])


def _note(folder: RunFolder, jobs: Iterable[Submitted]) -> None:
    _file(folder).parent.mkdir(parents=True, exist_ok=True)
    write_json(_file(folder), [asdict(entry) for entry in jobs])


def chain(name: str, folder: RunFolder, tasks: Iterable[Job], code: Path | None) -> list[BatchJob]:
    """A batch job for each task of the run of that name, in order."""
    excluded = tuple(History(folder.path).bad_nodes())
    run = str(folder.path.absolute())
    return [
        BatchJob(
            f"{name}.{task.stage}.{task.task.name}",
            task,
            _command(run, f"{task.stage}.{task.task.name}"),
            code,
            excluded,
        )
        for task in tasks
    ]


def array(
    name: str,
    folder: RunFolder,
    members: Sequence[str],
    stages: Sequence[str],
    largest: Task,
    code: Path | None,
) -> BatchJob:
    """The batch job that runs stages of a sweep's members, each in an allocation of its own.

    Args:
        members: their numbers.
        largest: the task of the stages that needs the most.
    """
    histories = [History(each.path) for each in (folder, *map(folder.member, members))]
    excluded = sorted({node for history in histories for node in history.bad_nodes()})
    return BatchJob(
        f"{name}.sweep",
        Job(folder.path.absolute(), "sweep", largest),
        _command(f"{folder.path.absolute()}/sweep/{MEMBER}", ",".join(stages)),
        code,
        tuple(excluded),
        array=str(RangeSet(",".join(str(int(number)) for number in members))),
    )


def _command(run: str, stages: str) -> tuple[str, ...]:
    launcher = (sys.executable, "-m", "llmscale", "run")
    return (*launcher, f"{run}/recipe.yaml", f"--run-dir={run}", f"--stages={stages}")


def submit_held(
    folder: RunFolder, jobs: list[BatchJob], cluster: ClusterSettings
) -> list[Submitted]:
    """Submits jobs, each to start when the one before has ended well, the first held back.

    So that none starts before all are known to the run folder.

    Raises:
        MachineError: if SLURM refuses one; those before it are taken back.
    """
    _note(folder, [])
    submitted: list[Submitted] = []
    try:
        for job, script in [(job, job.script(cluster)) for job in jobs]:
            when = f"--dependency=afterok:{submitted[-1].job}" if submitted else "--hold"
            submitted.append(_submitted(job, commands.submit([when], script)))
        _note(folder, submitted)
    except BaseException:
        if submitted:
            commands.cancel(entry.job for entry in reversed(submitted))
        raise
    return submitted


def _submitted(job: BatchJob, number: str) -> Submitted:
    logs = f"{job.needs.run_folder}/slurm/{number}"
    if job.array is not None:
        return Submitted(number, None, None, now(), f"{logs}_*.log", job.array)
    return Submitted(number, job.needs.stage, job.needs.task.name, now(), f"{logs}.log")
