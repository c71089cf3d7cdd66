"""The errors a user sees, each with the exit code docs/commands.md promises."""

from typing import Any


class LlmscaleError(Exception):
    """An error whose message is one line that names the place, the cause and the mend."""

    exit_code = 1
    answer: dict[str, Any] | None = None
    """What is known all the same, for ``--json``."""


class RecipeError(LlmscaleError):
    """The recipe or the call is wrong; nothing was started and nothing was written."""

    exit_code = 2


class MachineError(LlmscaleError):
    """The machine lacks something the recipe needs."""

    exit_code = 3


class StageError(LlmscaleError):
    """A stage failed while it ran."""

    exit_code = 4


class Disagreement(StageError):
    """A layout that differs from one rank; ``answer`` holds all that was compared."""

    def __init__(self, message: str, answer: dict[str, Any]) -> None:
        super().__init__(message)
        self.answer = answer


class Interrupted(LlmscaleError):
    """The user or the system asked the run to stop; running again goes on."""

    exit_code = 130
