"""Looking at a run from its folder alone: status, logs, cancel, and its models."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmscale.artifacts import RunFolder, StageFolder
from llmscale.errors import RecipeError
from llmscale.progress import read_progress
from llmscale.recipe.recipe import read_resolved


def open_run(path: Path) -> RunFolder:
    """The run folder at a path.

    Raises:
        RecipeError: if there is none.
    """
    if not (path / "recipe.yaml").is_file():
        raise RecipeError(f"{path}: is no run folder (no recipe.yaml); give the --run-dir of a run")
    return RunFolder(path)


def status(folder: RunFolder) -> dict[str, Any]:
    """Who runs here, and how far each stage is."""
    recipe = read_resolved(folder.recipe_file)
    holder = folder.holder()
    stages = []
    for name in recipe.order():
        stage = folder.stage(name)
        manifest = stage.manifest()
        state = manifest.get("status", "waiting")
        if state == "running" and holder is None:
            state = "interrupted"
        stages.append(
            {
                "stage": name,
                "kind": recipe.stages[name].kind,
                "status": state,
                "progress": read_progress(stage.progress_file) if state == "running" else None,
                "error": manifest.get("error"),
                "metrics": manifest.get("metrics", {}),
            }
        )
    running = None if holder is None else str(holder)
    return {"run": str(folder.path), "recipe": recipe.name, "running": running, "stages": stages}


def latest_stage(folder: RunFolder) -> str:
    """The stage that began last.

    Raises:
        RecipeError: if none has begun.
    """
    begun = [
        (manifest["started"], name)
        for name in read_resolved(folder.recipe_file).order()
        if (manifest := folder.stage(name).manifest())
    ]
    if not begun:
        raise RecipeError(f"{folder.path}: no stage has begun")
    return max(begun)[1]


def log_lines(
    stage: StageFolder, rank: int, follow: bool, running: Callable[[], bool]
) -> Iterator[str]:
    """A rank's log; with ``follow``, as it grows, until the run ends.

    Raises:
        RecipeError: if the rank has no log.
    """
    file = stage.log_file(rank)
    if not file.exists():
        have = ", ".join(sorted(p.name for p in stage.logs.glob("*.log"))) or "none"
        raise RecipeError(f"{file}: no such log; there are: {have}")
    with file.open(encoding="utf-8", errors="replace") as lines:
        while True:
            alive = running()
            yield from lines
            if not (follow and alive):
                return
            time.sleep(0.2)


def cancel(folder: RunFolder) -> str:
    """Asks the run in this folder to save and stop; says what was done.

    Raises:
        RecipeError: if it runs on another host.
    """
    holder = folder.holder()
    if holder is None:
        return "nothing runs in this folder"
    if not holder.is_here():
        raise RecipeError(f"{folder.path}: {holder} runs it; cancel it there")
    os.kill(holder.process, signal.SIGTERM)
    return f"asked {holder} to save and stop"


def split_model(model: str) -> tuple[Path, str] | None:
    """``RUN_DIR:STAGE`` as its parts; None where the text is a folder's path."""
    run, colon, stage = model.rpartition(":")
    if colon and run and (Path(run) / "recipe.yaml").is_file():
        return Path(run), stage
    return None


def model_folder(model: str) -> Path:
    """The Hugging Face folder that ``MODEL`` names.

    Raises:
        RecipeError: if there is none.
    """
    parts = split_model(model)
    folder = Path(model) if parts is None else open_run(parts[0]).stage(parts[1]).hf
    if not (folder / "config.json").is_file():
        if parts is None:
            raise RecipeError(
                f"{model}: no Hugging Face folder (no config.json) and no RUN_DIR:STAGE"
            )
        raise RecipeError(
            f"{model}: the stage has no exported model yet; finish it, or llmscale export it"
        )
    return folder
