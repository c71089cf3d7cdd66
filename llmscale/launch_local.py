"""Starting a run on this machine."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from llmscale.artifacts import write_text
from llmscale.clusters.devices import cuda_present, require_device
from llmscale.errors import MachineError, RecipeError
from llmscale.launch import Request, run_pipeline
from llmscale.recipe.sweep import in_words
from llmscale.runs import require_no_live_jobs
from llmscale.stages.trained import TrainedStage
from llmscale.sweeps import dry_run, run_sweep


@dataclass(frozen=True)
class LocalLaunch:
    """A run whose ranks are processes of this machine."""

    request: Request

    def dry_run(self) -> tuple[dict[str, Any], str]:
        """The tasks that ``run`` would start, and what it would do with each stage."""
        return dry_run_in_words(self.request)

    def run(self, console: Console) -> dict[str, Any]:
        """Runs the stages here."""
        self._require_machine()
        if self.request.recipe.sweep:
            return run_sweep(self.request, lambda request: request.pipeline(console), console)
        return run_pipeline(self.request.pipeline(console), self.request, console)

    def detach(self) -> tuple[dict[str, Any], str]:
        """Starts ``run`` in the background, with its output in ``RUN_DIR/launcher.log``."""
        self._require_machine()
        return detach(self.request)

    def _require_machine(self) -> None:
        recipe = self.request.recipe
        require_no_live_jobs(self.request.folder)
        require_device(recipe.cluster.device)
        trained = [
            (name, stage)
            for each in (recipe, *recipe.members())
            for name, stage in each.stages.items()
            if isinstance(stage, TrainedStage)
        ]
        for _, stage in trained:
            stage.require_packages()
        in_fp8 = [name for name, stage in trained if stage.precision == "fp8"]
        if in_fp8 and not cuda_present():
            raise MachineError(
                f"stages.{in_fp8[0]}.precision: fp8 needs an NVIDIA GPU, and this machine has "
                "none; use bf16"
            )


def dry_run_in_words(request: Request) -> tuple[dict[str, Any], str]:
    """What a dry run tells of tasks that are no jobs of their own."""
    answer = dry_run(request)
    lines = _lines(answer["tasks"])
    for member in answer.get("sweep", ()):
        lines += [f"member {member['member']}: {in_words(member['values'])}"]
        lines += [f"  {line}" for line in _lines(member["tasks"])]
    return answer, "\n".join(lines)


def detach(request: Request) -> tuple[dict[str, Any], str]:
    """Starts ``llmscale run`` of a request in the background, as its recipe says.

    Raises:
        RecipeError: if the folder is in use.
    """
    folder, stages = request.folder, request.stages
    holder = folder.holder()
    if holder is not None:
        raise RecipeError(f"{folder.place}: {holder} is running in this folder")
    folder.path.mkdir(parents=True, exist_ok=True)
    submitted = folder.path.absolute() / "submitted.yaml"
    write_text(submitted, request.recipe.to_yaml())
    command = [sys.executable, "-m", "llmscale", "run", str(submitted)]
    command += ["--run-dir", folder.full_place]
    command += ["--stages", ",".join(stages)] if stages else []
    command += ["--fresh"] if request.fresh else []
    log = folder.path / "launcher.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    run = folder.place
    answer = {"run": run, "process": process.pid, "log": str(log)}
    return answer, f"running in {run}; see llmscale status {run}"


def _lines(tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"{task['stage']}: {task['task']} on {task['ranks']} rank(s): {task['action']}"
        for task in tasks
    ]
