"""A run from its folder alone: who runs there, logs, cancel, and its models."""

import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ClusterShell.RangeSet import RangeSet

from llmscale.artifacts import RunFolder
from llmscale.clusters.ray.connection import own_submission
from llmscale.clusters.ray.jobs import UNREACHABLE, RayJob, job_of, note_state
from llmscale.clusters.slurm import commands
from llmscale.clusters.slurm.commands import JobState
from llmscale.clusters.slurm.jobs import live_jobs, submitted_jobs
from llmscale.errors import MachineError, RecipeError
from llmscale.mirror import opened, told_files
from llmscale.recipe.recipe import read_resolved
from llmscale.settings import choices
from llmscale.storage import is_url, plain_path

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BETWEEN_QUESTIONS = 5.0


def open_run(place: str) -> RunFolder:
    """The run folder at a path; of one at a URL, a copy of what is told of it.

    Raises:
        RecipeError: if there is none.
        MachineError: if a URL's storage does not answer, or refuses.
    """
    if is_url(place):
        return _viewed(place)
    path = plain_path(place)
    if not (path / "recipe.yaml").is_file():
        raise RecipeError(f"{path}: is no run folder (no recipe.yaml); give the --run-dir of a run")
    return RunFolder(path)


def _viewed(url: str) -> RunFolder:
    folder = RunFolder(opened(url, "views"))
    if not folder.recipe_file.is_file():
        raise RecipeError(f"{url}: is no run folder (no recipe.yaml); give the --run-dir of a run")
    refresh(folder)
    return folder


def refresh(folder: RunFolder) -> None:
    """Brings a copy of what is told of a run at a URL up to date.

    Raises:
        StageError: if the storage cannot be reached, or refuses.
    """
    if folder.mirror is not None:
        stages = read_resolved(folder.recipe_file).order()
        told = [scope for name in stages for scope in told_files(name)]
        folder.pull("history.jsonl", "ray/job.json", *told)


def known_live_jobs(folder: RunFolder) -> dict[str, JobState]:
    """The run's jobs that SLURM still has; none where SLURM cannot be asked."""
    if not submitted_jobs(folder) or shutil.which("squeue") is None:
        return {}
    with suppress(MachineError):
        return live_jobs(folder)
    return {}


def known_ray_job(folder: RunFolder) -> RayJob | None:
    """The run's Ray job as it is now, if it lives, or if its cluster does not answer."""
    job = job_of(folder)
    if job is None or not job.live:
        return None
    try:
        job = job.asked()
    except MachineError:
        return replace(job, state=UNREACHABLE)
    note_state(folder, job)
    return job if job.live else None


def require_no_live_jobs(folder: RunFolder) -> None:
    """Checks that no other job is to run in a folder; one of SLURM's that is ending may be.

    Raises:
        RecipeError: if one is.
    """
    ray_job = known_ray_job(folder)
    if ray_job is not None and ray_job.live and ray_job.job != own_submission():
        raise RecipeError(
            f"{folder.place}: {ray_job} is in this folder; wait for it, llmscale cancel it, or "
            "choose another --run-dir"
        )
    live = known_live_jobs(folder)
    if jobs := [job for job, state in live.items() if state.state != "COMPLETING"]:
        raise RecipeError(
            f"{folder.place}: job {', '.join(jobs)} is in SLURM's queue for this folder; wait for "
            "it, llmscale cancel it, or choose another --run-dir"
        )


class Activity:
    """Whether anything runs in a folder, asked as often as one likes."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._asked = -math.inf
        self._jobs = False

    def __call__(self) -> bool:
        if time.monotonic() - self._asked > SECONDS_BETWEEN_QUESTIONS:
            jobs, ray_job = known_live_jobs(self._folder), known_ray_job(self._folder)
            self._jobs = bool(jobs) or (ray_job is not None and ray_job.live)
            if self._folder.mirror is not None:
                self._jobs = self._folder.holder() is not None or self._jobs
                refresh(self._folder)
            self._asked = time.monotonic()
        return self._jobs or (self._folder.mirror is None and self._folder.holder() is not None)


def begun_stages(folder: RunFolder) -> list[str]:
    """The stages that have begun, by the time they did."""
    begun = [
        (manifest["started"], number, name)
        for number, name in enumerate(read_resolved(folder.recipe_file).order())
        if (manifest := folder.stage(name).manifest())
    ]
    return [name for _started, _number, name in sorted(begun)]


def latest_stage(folder: RunFolder) -> str:
    """The stage that began last.

    Raises:
        RecipeError: if none has begun.
    """
    begun = begun_stages(folder)
    if not begun:
        jobs = [f"job {job} is {state}" for job, state in known_live_jobs(folder).items()]
        if (ray_job := known_ray_job(folder)) is not None:
            jobs.append(f"see {ray_job}: ray job logs {ray_job.job} --address {ray_job.address}")
        if read_resolved(folder.recipe_file).sweep:
            jobs.append(f"give a member's folder, like {folder.member('000').path}")
        raise RecipeError(
            f"{folder.place}: no stage has begun" + "".join(f"; {job}" for job in jobs)
        )
    return begun[-1]


def log_lines(folder: RunFolder, rank: int, only: str | None) -> Iterator[str]:
    """A rank's log as it is now, of one stage or of the one begun last.

    Raises:
        RecipeError: if there is no such stage, or the rank has no log of it.
    """
    _require_stage(folder, only)
    stage = folder.stage(only or latest_stage(folder))
    file = stage.log_file(rank)
    if not file.exists():
        have = ", ".join(sorted(p.name for p in stage.logs.glob("*.log"))) or "none"
        raise RecipeError(f"{file}: no such log; there are: {have}")
    with file.open(encoding="utf-8", errors="replace") as lines:
        yield from lines


def followed_lines(
    folder: RunFolder, rank: int, only: str | None, running: Callable[[], bool]
) -> Iterator[str]:
    """A rank's log as it grows until the run ends: of one stage, or from the latest one on.

    Raises:
        RecipeError: if there is no such stage, or the rank has had no log in the end.
    """
    _require_stage(folder, only)
    earlier = begun_stages(folder)[:-1]
    read: dict[str, int] = {}
    shown = only
    while True:
        alive = running()
        for name in [only] if only else begun_stages(folder):
            file = folder.stage(name).log_file(rank)
            if (name in earlier and not only) or not file.exists():
                continue
            with file.open(encoding="utf-8", errors="replace") as lines:
                lines.seek(read.get(name, 0))
                new = lines.readlines()
                read[name] = lines.tell()
            if new and name != shown:
                shown = name
                yield f"==> {name} <==\n"
            yield from new
        if not alive:
            break
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if not read:
        yield from log_lines(folder, rank, only)


def _require_stage(folder: RunFolder, name: str | None) -> None:
    stages = read_resolved(folder.recipe_file).order()
    if name is not None and name not in stages:
        raise RecipeError(f"--stage: {name!r} is no stage of the run; use {choices(stages)}")


def cancel(folder: RunFolder) -> str:
    """Asks the run in this folder to save and stop; says what was done.

    Raises:
        RecipeError: if it runs on another host.
        MachineError: if SLURM or Ray does not answer.
    """
    holder, ray_job = folder.holder(), known_ray_job(folder)
    if ray_job is not None and (ray_job.live or holder is None):
        ray_job.stop()
        return f"asked Ray job {ray_job.job} to save and stop"
    local = holder is not None and holder.job is None
    if not local and (jobs := live_jobs(folder)):
        return _cancel_jobs(jobs)
    if holder is None:
        return "nothing runs in this folder"
    if not holder.is_here():
        raise RecipeError(f"{folder.place}: {holder} runs it; cancel it there")
    os.kill(holder.process, signal.SIGTERM)
    return f"asked {holder} to save and stop"


def _cancel_jobs(jobs: dict[str, JobState]) -> str:
    """Takes waiting jobs from the queue, then asks those that run."""
    waiting = _folded(job for job, state in jobs.items() if state.waiting)
    at_work = _folded(job for job, state in jobs.items() if not state.waiting)
    done = []
    if waiting:
        commands.cancel(waiting)
        done.append(f"took job {', '.join(waiting)} from the queue")
    if at_work:
        commands.ask_to_stop(at_work)
        done.append(
            f"asked job {', '.join(at_work)} to save and stop "
            f"(scancel {' '.join(at_work)} ends it at once)"
        )
    return "; ".join(done)


def _folded(jobs: Iterable[str]) -> list[str]:
    """The jobs as SLURM's commands take them, the members of an array together: ``7_[0-2,5]``."""
    arrays: dict[str, list[str]] = {}
    for job in jobs:
        array, _, number = job.partition("_")
        arrays.setdefault(array, []).extend([number] if number else [])
    return [
        f"{array}_[{RangeSet(','.join(numbers))}]"
        if len(numbers) > 1
        else "_".join([array, *numbers])
        for array, numbers in arrays.items()
    ]


def split_model(model: str) -> tuple[str, str] | None:
    """``RUN_DIR:STAGE`` as its parts; None where the text is a folder's path, or a URL alone."""
    run, colon, stage = model.rpartition(":")
    if is_url(model):
        return (run, stage) if is_url(run) and "/" not in stage else None
    if colon and run and (plain_path(run) / "recipe.yaml").is_file():
        return run, stage
    return None


def _exported(run: str, stage: str) -> Path:
    folder = open_run(run)
    folder.pull(f"{stage}/hf")
    return folder.stage(stage).hf


def model_folder(model: str) -> Path:
    """The Hugging Face folder that ``MODEL`` names.

    Raises:
        RecipeError: if there is none.
    """
    parts = split_model(model)
    if parts is None and is_url(model):
        raise RecipeError(f"{model}: names no stage; give URL:STAGE")
    folder = plain_path(model) if parts is None else _exported(*parts)
    if not (folder / "config.json").is_file():
        if parts is None:
            raise RecipeError(
                f"{model}: no Hugging Face folder (no config.json) and no RUN_DIR:STAGE"
            )
        raise RecipeError(
            f"{model}: the stage has no exported model yet; finish it, or llmscale export it"
        )
    return folder
