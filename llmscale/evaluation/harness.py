"""Tasks of lm-evaluation-harness, by its own library."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmscale.errors import RecipeError
from llmscale.evaluation.packages import package

NOT_FIGURES = ("alias", "name", "sample_len")
TASK_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)
"""What reading a task's files, or its data set, ends in where they are wrong."""


def harness_figures(
    model: Any, tokenizer: Any, tasks: Sequence[str], folder: Path | None
) -> dict[str, dict[str, Any]]:
    """What the library finds of each task, by its own names, such as ``acc,none``.

    Args:
        tasks: names, of groups, too.
        folder: where the YAML files of more tasks are.

    Raises:
        MachineError: if lm-eval is missing.
        RecipeError: if there is no such task, or it cannot be read.
    """
    package("lm_eval", "tasks")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(tasks, folder)
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, device=str(model.device)),
        tasks=list(tasks),
        task_manager=manager,
        log_samples=False,
    )
    return {
        name: {key: value for key, value in own.items() if key not in NOT_FIGURES}
        for name, own in found["results"].items()
    }


def _manager(tasks: Sequence[str], folder: Path | None) -> Any:
    """Knows the tasks. Those of the folder alone, where that is enough: to find all that the
    library brings takes it a quarter of a minute."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if not _unknown(own, tasks):
            try:
                own.load(list(tasks))
                return own
            except TASK_ERRORS:
                pass  # it may refer to others
    everything = TaskManager(include_path=str(folder) if folder else None)
    if unknown := _unknown(everything, tasks):
        where = f", and none in {folder}" if folder else "; give the folder of your own ones"
        raise RecipeError(f"tasks: {unknown[0]!r} is no task of lm-evaluation-harness{where}")
    try:
        everything.load(list(tasks))
    except TASK_ERRORS as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(
            f"tasks: {', '.join(tasks)} cannot be read: {cause}; mend the task's file, or see to "
            "it that its data are on this machine"
        ) from None
    return everything


def _unknown(manager: Any, tasks: Sequence[str]) -> list[str]:
    return [name for name in tasks if not manager.match_tasks([name])]
