"""Starting a run: from a recipe and a folder to what its cluster makes of them."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from llmscale.artifacts import RunFolder
from llmscale.clusters.local import LocalCluster
from llmscale.clusters.ray.connection import own_submission
from llmscale.clusters.slurm.allocation import Allocation
from llmscale.display import ConsoleDisplay
from llmscale.errors import RecipeError
from llmscale.pipeline import Pipeline
from llmscale.rank import run_rank
from llmscale.recipe.recipe import Recipe, load_recipe, read_resolved

RUNS = Path(os.environ.get("LLMSCALE_RUNS", "runs"))
"""Where runs are that were not told a folder."""
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
        cluster = LocalCluster(run_rank, display.tick)
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
        return {"run": str(self.folder.path), "on": self.recipe.cluster.on, "tasks": tasks}


def launch(
    recipe: Path,
    overrides: Sequence[str],
    *,
    on: str | None,
    address: str | None,
    run_dir: Path | None,
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
        path = run_dir or RUNS / loaded.name
        if path.exists() and not path.is_dir():
            raise RecipeError(f"{path}: is a file; choose another --run-dir")
        return Request(loaded, RunFolder(path), stages, fresh)

    allocation = Allocation.own()
    begun = begun_by(allocation, run_dir) if allocation is not None else None
    nodes_told = any(override.startswith(("cluster.nodes=", "cluster=")) for override in overrides)
    if begun is not None:
        request = Request(read_resolved(begun.recipe_file), begun, stages)
    elif allocation is not None and not nodes_told:
        request = request_in_job(allocation, read)
    else:
        request = read()
    request.pipeline().tasks(stages)  # refuses stages and tasks that there are not
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
                request, address, named_folder=run_dir is not None or RUNS.is_absolute()
            )
        case "ray":
            return RayLaunch(request)
        case _:
            return LocalLaunch(request)


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
            with suppress(OSError):
                write_report(request.folder)
    return answer(request, console)


def answer(request: Request, console: Console) -> dict[str, Any]:
    """Says where the report is, and gives what ``run --json`` prints."""
    folder = request.folder
    console.print(f"report: {folder.report_file}", markup=False)
    metrics = {n: folder.stage(n).manifest().get("metrics", {}) for n in request.recipe.stages}
    return {"run": str(folder.path), "report": str(folder.report_file), "metrics": metrics}
