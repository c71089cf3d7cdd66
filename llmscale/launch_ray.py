"""Starting a run on Ray: as the driver that this process is, or by submitting a Ray job."""

import secrets
import time
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from llmscale.artifacts import RunFolder, now, write_text
from llmscale.clusters.ray.connection import connected, own_submission, require_ray
from llmscale.clusters.ray.jobs import RayJob, client, job_of, new_job, note_job, note_state, submit
from llmscale.clusters.ray.settings import RaySettings
from llmscale.clusters.snapshot import snapshot
from llmscale.clusters.stops import Stops
from llmscale.display import ConsoleDisplay
from llmscale.errors import Interrupted, LlmscaleError, MachineError, RecipeError, StageError
from llmscale.launch import Request, run_pipeline
from llmscale.launch_local import detach, dry_run_in_words
from llmscale.pipeline import Pipeline
from llmscale.runs import require_no_live_jobs
from llmscale.sweeps import run_sweep

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_OF_SILENCE = 60.0


@dataclass(frozen=True)
class RayLaunch:
    """A run whose ranks are actors of the Ray cluster that this process is in, or of its own."""

    request: Request

    def dry_run(self) -> tuple[dict[str, Any], str]:
        """The tasks that ``run`` would start, and what it would do with each stage."""
        return dry_run_in_words(self.request)

    def detach(self) -> tuple[dict[str, Any], str]:
        """Starts ``run`` in the background, where this process is not a Ray job already.

        Raises:
            RecipeError: if it is.
        """
        if (job := own_submission()) is not None:
            raise RecipeError(f"--detach: this is Ray job {job} already; leave it out")
        require_ray()
        return detach(self.request)

    def run(self, console: Console) -> dict[str, Any]:
        """Runs the stages; how that ended is known from the run folder when the cluster is gone."""
        require_ray()
        try:
            answer = self._run(console)
        except BaseException as error:
            self._note_end("STOPPED" if isinstance(error, Interrupted) else "FAILED")
            raise
        self._note_end("SUCCEEDED")
        return answer

    def _note_end(self, state: str) -> None:
        job = job_of(self.request.folder)
        if job is not None and job.job == own_submission():
            note_state(self.request.folder, replace(job, state=state))

    def _run(self, console: Console) -> dict[str, Any]:
        request = self.request
        settings = request.recipe.cluster.ray or RaySettings()
        ranks = max(task.ranks for task in request.pipeline().tasks(request.stages))
        with connected(ranks * settings.cpus_per_rank) as dashboard, Stops() as stops:
            from llmscale.clusters.ray.cluster import RayCluster

            code = self._begin(dashboard)
            device = request.recipe.cluster.device
            job = own_submission() or f"driver-{secrets.token_hex(4)}"

            def pipeline(request: Request) -> Pipeline:
                display = ConsoleDisplay(console, request.folder)
                cluster = RayCluster(job, settings, device, code, stops, display.tick, display.note)
                return Pipeline(request.recipe, request.folder, cluster, display)

            if request.recipe.sweep:
                return run_sweep(request, pipeline, console)
            return run_pipeline(pipeline(request), request, console)

    def _begin(self, dashboard: str) -> Any:
        """Makes the own job known to the run folder, and keeps the package as it is now."""
        folder = self.request.folder
        with folder.locked():
            require_no_live_jobs(folder)
            write_text(folder.recipe_file, self.request.recipe.to_yaml())
            submission, known = own_submission(), job_of(folder)
            if submission is not None and (known is None or known.job != submission):
                note_job(folder, RayJob(submission, f"http://{dashboard}", now()))
            return snapshot(folder)


@dataclass(frozen=True)
class RayJobLaunch:
    """A run that is submitted as a Ray job, by the Jobs API of a cluster.

    Attributes:
        address: of the cluster's dashboard, as ``http://HOST:PORT``.
        named_folder: whether the call names the run folder, which then is the cluster's, too.
    """

    request: Request
    address: str
    named_folder: bool

    def dry_run(self) -> tuple[dict[str, Any], str]:
        """The tasks that the job would start, as far as this machine can tell."""
        return dry_run_in_words(self.request)

    def detach(self) -> tuple[dict[str, Any], str]:
        """Submits the job, unless it is there already."""
        job, folder = self._job(), self.request.folder.place
        answer = {"run": folder, "jobs": [job.job]}
        return answer, f"submitted as Ray job {job.job}; see llmscale status {folder}"

    def run(self, console: Console) -> dict[str, Any]:
        """Submits the job, unless it is there already, and follows it to its end."""
        job, folder = self._job(), self.request.folder
        console.print(f"Ray job {job.job} at {job.address}", markup=False)
        try:
            said = _follow(job, console)
        except KeyboardInterrupt:
            raise Interrupted(
                f"the run goes on as Ray job {job.job}; to come back, run the same command, or "
                f"llmscale logs {folder.place} --follow; to end it, llmscale cancel {folder.place}"
            ) from None
        _require_success(job, said)
        return {"run": folder.place, "jobs": [job.job]}

    def _job(self) -> RayJob:
        """The run's job: the one that lives, or a new one.

        Noted before it is submitted: a call that is cut off leaves no job that nobody knows.
        """
        folder, recipe = self.request.folder, self.request.recipe
        known = job_of(folder)
        if known is not None and known.live and known.address == self.address:
            known = known.asked()  # not knowing must not lead to a second job
            if known.live:
                self._require_same_recipe(known)
                return known
        with client(self.address):
            pass  # that answers, before anything is written
        with folder.locked():
            require_no_live_jobs(folder)
            write_text(folder.recipe_file, recipe.to_yaml())
            folder.push(folder.recipe_file.name)
            job = new_job(recipe.name, self.address)
            note_job(folder, job)
        submit(job, recipe.to_yaml(), self._options(folder))
        return job

    def _require_same_recipe(self, job: RayJob) -> None:
        folder, recipe = self.request.folder, self.request.recipe
        if folder.recipe_file.read_text(encoding="utf-8") != recipe.to_yaml():
            raise RecipeError(
                f"{folder.place}: Ray job {job.job} runs another recipe in this folder; wait "
                "for it, llmscale cancel it, or choose another --run-dir"
            )

    def _options(self, folder: RunFolder) -> list[str]:
        stages = self.request.stages
        return [
            "--on=ray",
            *([f"--run-dir={folder.full_place}"] if self.named_folder else []),
            *([f"--stages={','.join(stages)}"] if stages else []),
            *(["--fresh"] if self.request.fresh else []),
        ]


def _follow(job: RayJob, console: Console) -> str:
    """Prints what a job says until it has ended; returns all of it."""
    said, answered = "", time.monotonic()
    while True:
        try:
            live, output = job.asked().live, job.output()
        except MachineError as error:
            if time.monotonic() - answered > SECONDS_OF_SILENCE:
                raise MachineError(f"{error}; the run may go on as Ray job {job.job}") from None
        else:
            answered = time.monotonic()
            console.print(output[len(said) :], end="", markup=False, highlight=False)
            said = output
            if not live:
                return said
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _require_success(job: RayJob, said: str) -> None:
    """Ends as the job did.

    Raises:
        LlmscaleError: with the exit code of the job's ``llmscale run``, and its last line.
    """
    state = job.asked().state
    if state == "SUCCEEDED":
        return
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
    line = f"Ray job {job.job} {state.lower()}: {last}"
    code = job.exit_code()
    kinds = (RecipeError, MachineError, StageError, Interrupted)
    kind: type[LlmscaleError] = next((k for k in kinds if k.exit_code == code), StageError)
    raise Interrupted(line) if state == "STOPPED" else kind(line)
