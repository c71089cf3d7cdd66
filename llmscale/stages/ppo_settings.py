"""What a recipe says of learning from rewards, part by part."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, ValidationInfo

from llmscale.rlhf.settings import Expectation
from llmscale.settings import NOT_IDENTITY, Name, Problem, Settings, shown
from llmscale.stages.base import StageOrFolder, beside_recipe, is_file
from llmscale.stages.tuned import DataFiles
from llmscale.training.settings import Optimizer


def _function(name: str, info: ValidationInfo) -> str:
    place, colon, function = name.rpartition(":")
    if not colon or not place or not function.isidentifier():
        raise ValueError(
            f"{shown(name)} names no function; write MODULE:FUNCTION, or FILE.py:FUNCTION"
        )
    return f"{beside_recipe(place, info)}:{function}" if place.endswith(".py") else name


FunctionName = Annotated[str, AfterValidator(_function)]
"""``MODULE:FUNCTION``, or ``FILE.py:FUNCTION`` with a path from the recipe's folder on."""


class Prompts(DataFiles):
    """Files of prompts.

    ``first_words``: not a question is asked, but the first words of a text are to be gone on with.
    """

    first_words: PositiveInt | None = None


class RewardSource(Settings):
    """What scores answers: a ``model`` that scores texts, a Python ``function``, or a ``url``.

    A function is given the prompts and the responses, as two lists of strings, and returns a
    number for each response; a URL is sent them as JSON, and answers ``{"scores": [...]}``. The
    reward is the sum of all sources' scores by their weights; one of weight 0 is told alone.
    """

    model: StageOrFolder | None = None
    head: Name | None = None
    function: FunctionName | None = None
    url: str | None = Field(default=None, pattern=r"^https?://")
    weight: float = 1.0
    timeout_seconds: Annotated[PositiveFloat, NOT_IDENTITY] = 60.0

    def problems(self) -> Iterator[Problem]:
        """What is wrong beyond types."""
        given = [key for key in ("model", "function", "url") if getattr(self, key) is not None]
        if len(given) != 1:
            named = " and ".join(given) or "none of them"
            yield Problem((), f"give one of model, function and url; {named} is given")
        if self.head is not None and self.model is None:
            yield Problem(("head",), "only a model has heads; remove it")
        file, _, _ = (self.function or "").rpartition(":")
        if file.endswith(".py") and not is_file(file):
            yield Problem(("function",), f"{file} is no file; give a path from the recipe's folder")


class Critic(Expectation):
    """What expects rewards: a model that scores texts, by default the policy's with a new head.

    Its optimizer is the policy's, if it has none of its own.
    """

    start_from: StageOrFolder | None = None
    optimizer: Optimizer | None = None
