"""Running a function on real ranks of this machine, for tests.

The ranks are the product's own local ranks, forked from one process that imported torch
and what else they need, so that starting eight of them takes about a second.
"""

import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from llmscale.artifacts import RunFolder, StageFolder, write_json
from llmscale.clusters.base import Job, Task
from llmscale.clusters.local import PRELOADED, LocalCluster
from llmscale.clusters.process import Entry
from llmscale.parallel.layout import Layout

PRELOADED.extend(
    (
        "_pytest.config",
        "llmscale.rank",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
        "llmscale.training.deepspeed_engine",
    )
)  # once for all tests' ranks, whoever starts them first: what one recipe or another needs


def run_ranks(program: Entry, ranks: int, folder: Path, **settings: Any) -> Any:
    """Runs ``program`` on that many ranks; returns what rank 0 gave to ``answer``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", settings)
    LocalCluster(program).run(Job(folder, "stage", Task("test", ranks)))
    return json.loads((folder / "answer.json").read_text())


def settings(job: Job) -> dict[str, Any]:
    """What the test gave to ``run_ranks``."""
    return json.loads((job.run_folder / "settings.json").read_text())


def answer(job: Job, rank: int, value: Any) -> None:
    """What the test gets back."""
    if rank == 0:
        write_json(job.run_folder / "answer.json", value)


def kill_a_rank_after(stage: StageFolder, step: int, number: int = 0) -> None:
    """Kills a rank of a training stage once that has logged so many steps."""
    while sum("loss" in line for line in stage.metrics()) < step:
        time.sleep(0.02)
    said = stage.log_file(number).read_text()
    rank = int(re.findall(rf"train: rank {number} of \d+, process (\d+)", said)[-1])
    os.kill(rank, signal.SIGKILL)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process whose call names a folder, or what is in it."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if re.search(rf"{folder}\b", " ".join(process.info["cmdline"] or []))
        and process.pid != os.getpid()
    ]


def cut_off_after(stage: StageFolder, step: int) -> None:
    """Makes a finished stage what a kill leaves: no later checkpoint, and metrics that went on."""
    for checkpoint in stage.checkpoints.glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(stage.hf)
    stage.update_manifest(status="running")


@contextmanager
def joined(job: Job, rank: int, rendezvous: str, layout: Layout) -> Iterator[Any]:
    """The world and the layout's groups, on the CPU."""
    from llmscale.parallel.world import joined_world, process_groups

    with (
        joined_world(rank=rank, ranks=job.task.ranks, rendezvous=rendezvous, device="cpu") as world,
        process_groups(layout, seed=1),
    ):
        yield world


def layout_ranks(layout: dict[str, Any]) -> int:
    """How many ranks a layout's settings need."""
    degrees = ("tensor", "pipeline", "context", "data")
    return math.prod(layout.get(degree, 1) for degree in degrees)


class Quiet:
    """A display that shows nothing."""

    def stage_skipped(self, name: str) -> None: ...

    def stage_started(self, name: str, task: str, ranks: int) -> None: ...

    def stage_finished(self, name: str, metrics: dict[str, Any]) -> None: ...

    def note(self, line: str) -> None: ...


def run_recipe(
    recipe: Path, folder: Path, overrides: list[str], only: list[str] | None = None
) -> RunFolder:
    """Runs a recipe as ``llmscale run`` does, in this process."""
    from llmscale.pipeline import Pipeline
    from llmscale.rank import run_rank
    from llmscale.recipe.recipe import load_recipe

    run_folder = RunFolder(folder)
    pipeline = Pipeline(load_recipe(recipe, overrides), run_folder, LocalCluster(run_rank), Quiet())
    pipeline.run(only)
    return run_folder
