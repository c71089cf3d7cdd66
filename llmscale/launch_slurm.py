"""Starting a run on SLURM: by submitting jobs, or within the job that this process leads."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from llmscale.artifacts import RunFolder, write_text
from llmscale.clusters.slurm import commands
from llmscale.clusters.slurm.allocation import Allocation, SlurmCluster
from llmscale.clusters.slurm.jobs import (
    Submitted,
    chain,
    live_jobs,
    note_own_job,
    submit_held,
    submitted_jobs,
)
from llmscale.clusters.slurm.script import BatchJob
from llmscale.clusters.slurm.settings import SlurmSettings
from llmscale.clusters.snapshot import code_of, runs_from, snapshot, snapshot_place
from llmscale.clusters.stops import Stops, deaf_to_sigterm
from llmscale.display import ConsoleDisplay
from llmscale.errors import Interrupted, MachineError, RecipeError, StageError
from llmscale.follow_slurm import follow
from llmscale.launch import RUNS, Request, answer, run_pipeline
from llmscale.lock import HEARTBEAT_SECONDS, STALE_SECONDS
from llmscale.pipeline import Pipeline
from llmscale.recipe.recipe import read_resolved
from llmscale.runs import require_no_live_jobs
from llmscale.status import members
from llmscale.storage import plain_path
from llmscale.sweeps import Sweep, dry_run, run_sweep

SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class SlurmLaunch:
    """A run whose tasks are jobs, each to start when the one before has ended well."""

    request: Request

    def dry_run(self) -> tuple[dict[str, Any], str]:
        """The batch scripts."""
        cluster, code = self.request.recipe.cluster, snapshot_place(self.request.folder)
        scripts = [job.script(cluster) for job in self._left(code)]
        return {**dry_run(self.request), "scripts": scripts}, "\n".join(scripts).rstrip()

    def run(self, console: Console) -> dict[str, Any]:
        """Submits what is left to run, unless it is in the queue already, and follows it."""
        jobs = self._jobs(console)
        request, display = self.request, ConsoleDisplay(console, self.request.folder)
        follow(request.recipe, request.folder, jobs, display)
        tasks_alone = any("." in name for name in request.stages or ())
        if not (request.recipe.sweep or tasks_alone or request.finished(request.stages)):
            raise StageError("jobs ended before their stages; run the same command to go on")
        done = answer(request, console)
        if request.recipe.sweep:
            done["sweep"] = members(request.folder, request.recipe, {})
        return done

    def detach(self) -> tuple[dict[str, Any], str]:
        """Submits what is left to run."""
        run = str(self.request.folder.path)
        jobs = [entry.job for entry in self._jobs(Console(quiet=True))]
        line = f"submitted as job {', '.join(jobs)}" if jobs else "all stages were finished before"
        return {"run": run, "jobs": jobs}, f"{line}; see llmscale status {run}"

    def _jobs(self, console: Console) -> list[Submitted]:
        folder, recipe = self.request.folder, self.request.recipe
        commands.require_slurm()
        commands.require_container_plugin(recipe.cluster.slurm or SlurmSettings())
        live, jobs = live_jobs(folder), submitted_jobs(folder)
        if not live:
            return self._submit(console)
        if jobs[0].stage is None and jobs[0].array is None:
            raise RecipeError(
                f"{folder.path}: job {', '.join(live)} runs all stages here; follow it by llmscale "
                f"logs {folder.path} --follow, or end it by llmscale cancel {folder.path}"
            )
        if folder.recipe_file.read_text(encoding="utf-8") != recipe.to_yaml():
            raise RecipeError(
                f"{folder.path}: job {', '.join(live)} runs another recipe in this folder; wait "
                "for it, llmscale cancel it, or choose another --run-dir"
            )
        first = live.get(jobs[0].job)
        if first is not None and first.reason == "JobHeldUser":
            commands.release(jobs[0].job)  # its submission was cut off before this
        return jobs

    def _submit(self, console: Console) -> list[Submitted]:
        """Writes the recipe and the code that are to run, submits, and lets the jobs go."""
        request, folder = self.request, self.request.folder
        with folder.locked():
            require_no_live_jobs(folder)
            write_text(folder.recipe_file, request.recipe.to_yaml())
            code = snapshot(folder)
            parts = [request]
            if request.recipe.sweep:
                sweep = Sweep.of(request)
                sweep.lay_out(code)
                parts = [sweep.common, *(member.request for member in sweep.members)]
            for part in parts if request.fresh else ():
                pipeline = part.pipeline(console)
                pipeline.set_aside(pipeline.chosen(part.stages))
            pipeline = parts[0].pipeline(console)
            for plan in pipeline.plans(parts[0].stages):
                if plan.action == "skip":
                    pipeline.display.stage_skipped(plan.name)
            submitted = submit_held(folder, self._left(code), request.recipe.cluster)
        if submitted:
            commands.release(submitted[0].job)
        return submitted

    def _left(self, code: Path | None) -> list[BatchJob]:
        """The jobs of what is left to run."""
        request = self.request
        if request.recipe.sweep:
            return Sweep.of(request).jobs(code)
        tasks = request.pipeline().jobs(request.stages)
        return chain(request.recipe.name, request.folder, tasks, code)


def request_in_job(allocation: Allocation, read: Callable[[Sequence[str]], Request]) -> Request:
    """The request of a call within a job, where a recipe on SLURM takes all nodes of the job.

    Args:
        read: reads the request, with more overrides.

    Raises:
        RecipeError: if the recipe is wrong, or does not fit the job's nodes.
    """
    everywhere = [f"cluster.nodes={len(allocation.nodes)}"]
    try:
        request = read(())
    except RecipeError as error:
        try:
            return read(everywhere)  # its layout may need these nodes
        except RecipeError:
            raise error from None
    cluster, needed = request.recipe.cluster, _nodes_needed(request)
    only_data = needed < cluster.nodes
    if cluster.on != "slurm" or needed == len(allocation.nodes) or only_data:
        return request
    try:
        return read(everywhere)
    except RecipeError as error:
        raise RecipeError(f"{error}; or give the job --nodes={needed}") from None


def begun_by(allocation: Allocation, run_dir: str | None) -> RunFolder | None:
    """The run folder that an earlier start of this job began in; None at its first start.

    Args:
        run_dir: the one that the call names, if it does.
    """
    if not allocation.starts_before:
        return None
    for path in [plain_path(run_dir)] if run_dir else sorted(Path(RUNS).glob("*")):
        folder = RunFolder(path)
        if allocation.job in [entry.job for entry in submitted_jobs(folder)]:
            return folder
    return None


def _nodes_needed(request: Request) -> int:
    return max(task.nodes for task in request.pipeline().tasks(request.stages))


@dataclass(frozen=True)
class JobLaunch:
    """A run whose ranks are steps of the job that this process leads."""

    request: Request
    allocation: Allocation

    def dry_run(self) -> tuple[dict[str, Any], str]:
        """As on a login node."""
        return SlurmLaunch(self.request).dry_run()

    def detach(self) -> tuple[dict[str, Any], str]:
        """Refuses: a job ends when the process that leads it does."""
        raise RecipeError(f"--detach: this is job {self.allocation.job} already; leave it out")

    def run(self, console: Console) -> dict[str, Any]:
        """Runs the stages; a job that SLURM stops goes back into its queue."""
        with Stops() as stops:
            self._require_nodes()
            settings = self.request.recipe.cluster.slurm or SlurmSettings()
            commands.require_container_plugin(settings)
            request = self._as_it_began(stops)

            def pipeline(request: Request) -> Pipeline:
                display = ConsoleDisplay(console, request.folder)
                cluster = SlurmCluster(self.allocation, settings, stops, display.tick, display.note)
                return Pipeline(request.recipe, request.folder, cluster, display)

            try:
                if request.recipe.sweep:
                    return run_sweep(request, pipeline, console)
                return run_pipeline(pipeline(request), request, console)
            except Interrupted as stop:
                if stops.by_the_scheduler:
                    self._requeue(stops, console, str(stop))
                raise

    def _require_nodes(self) -> None:
        have, needed = len(self.allocation.nodes), _nodes_needed(self.request)
        if needed > have:
            raise RecipeError(
                f"cluster.nodes: {needed} are needed, and this job has {have}; use --nodes={needed}"
            )

    def _wait_for_folder(self, stops: Stops) -> None:
        """Gives a job before this one the time to save, or to be known as dead."""
        deadline = time.monotonic() + STALE_SECONDS + HEARTBEAT_SECONDS
        while self.request.folder.holder() is not None and time.monotonic() < deadline:
            if stops.asked:
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _as_it_began(self, stops: Stops) -> Request:
        """The request with the recipe, and in the package, of the job's first start.

        That start notes both in the run folder, whatever becomes of the file and the checkout.
        """
        folder = self.request.folder
        self._wait_for_folder(stops)
        with folder.locked():
            if self.allocation.job not in [entry.job for entry in submitted_jobs(folder)]:
                require_no_live_jobs(folder)
                write_text(folder.recipe_file, self.request.recipe.to_yaml())
                snapshot(folder)
                note_own_job(folder, self.allocation.job)
        code = code_of(folder)
        if code is not None and not runs_from(code):
            # without the safe path, python -m would import the checkout it stands in, again
            found = {**os.environ, "PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
            stops.hold_back()
            os.execve(sys.executable, [sys.executable, "-m", "llmscale", *sys.argv[1:]], found)
        return replace(self.request, recipe=read_resolved(folder.recipe_file))

    def _requeue(self, stops: Stops, console: Console, why: str) -> None:
        """Puts the own job back into the queue.

        Where ``scontrol`` is missing, SLURM itself does so after a preemption: the job must
        then still be there.
        """
        try:
            with deaf_to_sigterm():
                commands.requeue(self.allocation.job)
        except MachineError as error:
            console.print(
                f"{why}; cannot requeue ({error}): waiting for SLURM, which requeues a preempted "
                "job; after a time limit, submit again to go on",
                markup=False,
            )
            before = len(stops.asked)
            while len(stops.asked) == before:
                time.sleep(SECONDS_BETWEEN_LOOKS)
        else:
            console.print(f"{why}; requeued as job {self.allocation.job}", markup=False)
