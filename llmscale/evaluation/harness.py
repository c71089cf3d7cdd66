"""Tasks of lm-evaluation-harness, by its own library."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmscale.errors import RecipeError
from llmscale.evaluation.packages import package


def harness_figures(
    model: Any, tokenizer: Any, tasks: Sequence[str], folder: Path | None
) -> dict[str, dict[str, Any]]:
    """What the library finds of each task, by its names: ``acc,none`` and the like.

    Data sets are read from this machine alone.

    Args:
        tasks: names, of groups, too.
        folder: where the YAML files of more tasks are.

    Raises:
        MachineError: if lm-eval is missing.
        RecipeError: if there is no such task, or it cannot be read.
    """
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    package("lm_eval", "tasks")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder) if folder else None)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        where = f" and none in {folder}" if folder else "; name their folder, if they are your own"
        raise RecipeError(f"tasks: {unknown[0]!r} is no task of lm-evaluation-harness{where}")
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, device=str(model.device)),
        tasks=list(tasks),
        task_manager=manager,
        log_samples=False,
    )
    return {
        name: {key: value for key, value in own.items() if key not in ("alias", "name")}
        for name, own in found["results"].items()
    }
