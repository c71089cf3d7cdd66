"""Starting a run: from a recipe and a folder to what its cluster makes of them."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from llmscale.artifacts import MANIFEST, RunFolder
from llmscale.clusters.base import Cluster
from llmscale.clusters.carried import CarryingCluster
from llmscale.clusters.local import LocalCluster
from llmscale.clusters.ray.connection import own_submission
from llmscale.clusters.slurm.allocation import Allocation
from llmscale.display import ConsoleDisplay
from llmscale.errors import RecipeError, StageError
from llmscale.mirror import opened
from llmscale.pipeline import Pipeline
from llmscale.rank import run_rank
from llmscale.recipe.recipe import Recipe, load_recipe, read_resolved
from llmscale.storage import is_url, plain_path, safe_url

RUNS = os.environ.get("LLMSCALE_RUNS", "runs")
"""Where runs are that were not told a folder: a path or a URL."""
DASHBOARD = ("http://", "https://")


class Launch(Protocol):
    """A checked call of ``llmscale run``: nothing is written and no process started yet."""

    def dry_run(self) -> tuple[dict[str, Any], str]:
        """What ``run`` would start: for ``--json``, and for people."""

    def run(self, console: Console) -> dict[str, Any]:
        """Runs it to its end.

        Raises:
            MachineError: if this machine lacks what it needs.
            StageError, Interrupted: as ``Pipeline.run``.
        """

    def detach(self) -> tuple[dict[str, Any], str]:
        """Starts it and lets it go on by itself: for ``--json``, and for people."""


@dataclass(frozen=True)
class Request:
    """A checked recipe, where it is to run, and how much of it.

    Attributes:
        stages: these alone, or single tasks as ``STAGE.TASK``; None for all.
        fresh: keep former results aside and start over.
    """

    recipe: Recipe
    folder: RunFolder
    stages: Sequence[str] | None = None
    fresh: bool = False

    def pipeline(self, console: Console | None = None) -> Pipeline:
        """The run's stages, on this machine."""
        display = ConsoleDisplay(console or Console(quiet=True), self.folder)
        cluster: Cluster = LocalCluster(run_rank, display.tick, self.recipe.imports())
        if self.folder.mirror is not None:
            cluster = CarryingCluster(cluster)
        return Pipeline(self.recipe, self.folder, cluster, display)

    def finished(self, stages: Sequence[str] | None) -> bool:
        """Whether nothing is left to run of these stages."""
        pipeline = self.pipeline()
        manifests = (self.folder.stage(name).manifest() for name in pipeline.chosen(stages))
        if any(manifest.get("status") != "finished" for manifest in manifests):
            return False  # without the fingerprints, which read what the recipe names
        return all(plan.action == "skip" for plan in pipeline.plans(stages))

    def dry_run(self) -> dict[str, Any]:
        """What would run, and what it would do with each stage, whatever the cluster."""
        pipeline = self.pipeline()
        tasks = [
            {"stage": plan.name, "action": plan.action, "task": task.name, "ranks": task.ranks}
            for plan in pipeline.plans(self.stages)
            for task in pipeline.tasks_of(plan.name, self.stages)
        ]
        return {"run": self.folder.place, "on": self.recipe.cluster.on, "tasks": tasks}


def launch(
    recipe: Path,
    overrides: Sequence[str],
    *,
    on: str | None,
    address: str | None,
    run_dir: str | None,
    stages: Sequence[str] | None,
    fresh: bool,
) -> Launch:
    """Reads and checks everything, and chooses how to start it.

    Args:
        address: of a Ray cluster's dashboard; RAY_ADDRESS may name it, too.

    Raises:
        RecipeError: if the recipe or the call is wrong.
    """
    from llmscale.launch_local import LocalLaunch
    from llmscale.launch_ray import RayJobLaunch, RayLaunch
    from llmscale.launch_slurm import JobLaunch, SlurmLaunch, begun_by, request_in_job

    told = on or any(text.startswith(("cluster.on=", "cluster=")) for text in overrides)
    if own_submission() is not None and not told:
        on = "ray"
    where = [f"cluster.on={on}"] if on else []

    def read(more: Sequence[str] = ()) -> Request:
        loaded = load_recipe(recipe, [*overrides, *where, *more])
        return Request(loaded, _run_folder(place or f"{RUNS}/{loaded.name}", loaded), stages, fresh)

    place = run_dir
    allocation = Allocation.own()
    begun = begun_by(allocation, place) if allocation is not None else None
    nodes_told = any(override.startswith(("cluster.nodes=", "cluster=")) for override in overrides)
    if begun is not None:
        request = Request(read_resolved(begun.recipe_file), begun, stages)
    elif allocation is not None and not nodes_told:
        request = request_in_job(allocation, read)
    else:
        request = read()
    request.pipeline().tasks(stages)  # refuses stages and tasks that there are not
    if request.recipe.cluster.on != "local":
        _warn_of_memory(request.recipe)
    if address is not None:
        _require_dashboard(address, request.recipe.cluster.on)
    elif (known := os.environ.get("RAY_ADDRESS", "")).startswith(DASHBOARD):
        address = known
    match request.recipe.cluster.on:
        case "slurm" if allocation is not None:
            return JobLaunch(request, allocation)
        case "slurm":
            return SlurmLaunch(request)
        case "ray" if address is not None:
            return RayJobLaunch(
                request, address, named_folder=place is not None or is_url(RUNS) or RUNS[:1] == "/"
            )
        case "ray":
            return RayLaunch(request)
        case _:
            return LocalLaunch(request)


def _run_folder(place: str, recipe: Recipe) -> RunFolder:
    """The folder of a run that is at a path or a URL, which has answered.

    Raises:
        RecipeError: if such a run cannot be there.
        MachineError: if the storage does not answer, or refuses.
    """
    if not is_url(place):
        path = plain_path(place)
        if path.exists() and not path.is_dir():
            raise RecipeError(f"{path}: is a file; choose another --run-dir")
        return RunFolder(path)
    url = safe_url(place)
    if recipe.cluster.on == "slurm":
        raise RecipeError(
            f"{url}: on SLURM a run is in a folder that all nodes share; give its path by --run-dir"
        )
    if recipe.sweep:
        raise RecipeError(
            f"{url}: a sweep is in a folder that its members share; give a path by --run-dir, or "
            "run a recipe without sweep"
        )
    folder = RunFolder(opened(url))
    folder.pull(*(f"{name}/{MANIFEST}" for name in recipe.order()), "ray/job.json", "history.jsonl")
    return folder


def _warn_of_memory(recipe: Recipe) -> None:
    """Says where a layout will not fit, on standard error; the plan may be wrong, so it runs."""
    from llmscale.learning_plans import learning_warnings
    from llmscale.plans import memory_warnings

    for line in [*memory_warnings(recipe), *learning_warnings(recipe)]:
        Console(stderr=True, soft_wrap=True).print(line, markup=False, highlight=False)


def _require_dashboard(address: str, on: str) -> None:
    if on != "ray":
        raise RecipeError(f"--address {address}: is a Ray cluster's; add --on ray")
    if not address.startswith(DASHBOARD):
        raise RecipeError(
            f"--address {address}: give the dashboard's, like http://HEAD:8265; on a node of the "
            "cluster, leave it out and set RAY_ADDRESS"
        )


def run_pipeline(pipeline: Pipeline, request: Request, console: Console) -> dict[str, Any]:
    """Runs a pipeline, writes the report whatever came of it, and tells the metrics."""
    from llmscale.report.report import write_report

    try:
        pipeline.run(request.stages, request.fresh)
    finally:
        if isinstance(pipeline.display, ConsoleDisplay):
            pipeline.display.stop()
        if request.folder.recipe_file.exists():
            with suppress(OSError, StageError):
                write_report(request.folder)
                request.folder.push(request.folder.report_file.name)
    return answer(request, console)


def answer(request: Request, console: Console) -> dict[str, Any]:
    """Says where the report is, and gives what ``run --json`` prints."""
    folder = request.folder
    report = f"{folder.place}/{folder.report_file.name}"
    console.print(f"report: {report}", markup=False)
    metrics = {n: folder.stage(n).manifest().get("metrics", {}) for n in request.recipe.stages}
    return {"run": folder.place, "report": report, "metrics": metrics}
