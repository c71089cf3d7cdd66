"""Packages that only evaluation needs, imported when they are used."""

import importlib
from typing import Any

from llmscale.packages import missing_package, require_package

NEEDED = {
    "classification": ("sklearn",),
    "generation": ("sacrebleu", "rouge_score"),
    "tasks": ("lm_eval",),
}
"""What each measure is made with."""


def require(classification: Any, generation: Any, tasks: Any) -> None:
    """Sees to it that the packages of what is measured are there; what is empty is not.

    Raises:
        MachineError: names the command that installs them.
    """
    wanted = {"classification": classification, "generation": generation, "tasks": tasks}
    for measure, asked in wanted.items():
        for name in NEEDED[measure] if asked else ():
            require_package(measure, name, "evaluation")


def package(name: str, measure: str) -> Any:
    """A module that a measure is made with.

    Raises:
        MachineError: names the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise missing_package(measure, str(error.name), "evaluation") from None
