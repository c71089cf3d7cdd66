"""Starting a run: from a recipe and a folder to a pipeline on a cluster."""

import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from llmscale.artifacts import RunFolder, write_text
from llmscale.clusters.devices import cuda_present, require_device
from llmscale.clusters.local import LocalCluster
from llmscale.display import ConsoleDisplay
from llmscale.errors import MachineError, RecipeError
from llmscale.pipeline import Pipeline
from llmscale.rank import run_rank
from llmscale.recipe.recipe import Recipe, load_recipe
from llmscale.stages.pretrain import Pretrain


@dataclass(frozen=True)
class Request:
    """A checked recipe and where it is to run."""

    recipe: Recipe
    folder: RunFolder


def request(
    recipe: Path, overrides: Sequence[str], *, on: str | None, run_dir: Path | None
) -> Request:
    """Reads and checks everything; nothing is written and no process started.

    Raises:
        RecipeError: if the recipe or the call is wrong.
    """
    where = [f"cluster.on={on}"] if on else []
    loaded = load_recipe(recipe, [*overrides, *where])
    path = run_dir or Path("runs", loaded.name)
    if path.exists() and not path.is_dir():
        raise RecipeError(f"{path}: is a file; choose another --run-dir")
    return Request(loaded, RunFolder(path))


def dry_run(request: Request, stages: Sequence[str] | None) -> dict[str, Any]:
    """The tasks that ``run`` would start, and what it would do with each stage."""
    recipe = request.recipe
    plans = _pipeline(request, Console(quiet=True)).plans(stages)
    tasks = [
        {"stage": plan.name, "action": plan.action, "task": task.name, "ranks": task.ranks}
        for plan in plans
        for task in recipe.stages[plan.name].tasks(recipe.cluster)
    ]
    return {"run": str(request.folder.path), "on": recipe.cluster.on, "tasks": tasks}


def run(
    request: Request, stages: Sequence[str] | None, fresh: bool, console: Console
) -> dict[str, Any]:
    """Runs the stages here and writes the report, whatever came of them.

    Raises:
        MachineError: if this machine cannot run the recipe.
        StageError, Interrupted: as ``Pipeline.run``.
    """
    from llmscale.report.report import write_report

    _require_runnable(request, stages)
    pipeline = _pipeline(request, console)
    try:
        pipeline.run(stages, fresh)
    finally:
        if isinstance(pipeline.display, ConsoleDisplay):
            pipeline.display.stop()
        if request.folder.recipe_file.exists():
            with suppress(OSError):
                write_report(request.folder)
    console.print(f"report: {request.folder.report_file}", markup=False)
    metrics = {
        n: request.folder.stage(n).manifest().get("metrics", {}) for n in request.recipe.stages
    }
    return {
        "run": str(request.folder.path),
        "report": str(request.folder.report_file),
        "metrics": metrics,
    }


def detached(request: Request, stages: Sequence[str] | None, fresh: bool) -> dict[str, Any]:
    """Starts ``run`` in the background, with its output in ``RUN_DIR/launcher.log``."""
    _require_runnable(request, stages)
    folder = request.folder
    holder = folder.holder()
    if holder is not None:
        raise RecipeError(f"{folder.path}: {holder} is running in this folder")
    folder.path.mkdir(parents=True, exist_ok=True)
    submitted = folder.path.absolute() / "submitted.yaml"
    write_text(submitted, request.recipe.to_yaml())
    command = [sys.executable, "-m", "llmscale", "run", str(submitted)]
    command += ["--run-dir", str(folder.path.absolute())]
    command += ["--stages", ",".join(stages)] if stages else []
    command += ["--fresh"] if fresh else []
    log = folder.path / "launcher.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return {"run": str(folder.path), "process": process.pid, "log": str(log)}


def _require_runnable(request: Request, stages: Sequence[str] | None) -> None:
    cluster = request.recipe.cluster
    if cluster.on != "local":
        raise MachineError(
            f"cluster.on: this version starts ranks on this machine only, not on {cluster.on}; "
            "use --on local, or --dry-run to see the tasks"
        )
    in_fp8 = [
        name
        for name, stage in request.recipe.stages.items()
        if isinstance(stage, Pretrain) and stage.precision == "fp8"
    ]
    require_device(cluster.device)
    if in_fp8 and not cuda_present():
        raise MachineError(
            f"stages.{in_fp8[0]}.precision: fp8 needs an NVIDIA GPU, and this machine has "
            "none; use bf16"
        )
    dry_run(request, stages)


def _pipeline(request: Request, console: Console) -> Pipeline:
    display = ConsoleDisplay(console, request.folder)
    return Pipeline(request.recipe, request.folder, LocalCluster(run_rank, display.tick), display)
