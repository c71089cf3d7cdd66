"""What answers are worth: reward models, Python functions, HTTP endpoints, and their sum.

Shape legend: n answers.
"""

import importlib
import importlib.util
import json
import math
import threading
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from llmscale.errors import LlmscaleError, RecipeError, StageError
from llmscale.evaluation.reward_models import RewardModel
from llmscale.rlhf.answers import Answer


class Scorer(Protocol):
    """Scores answers."""

    @property
    def shared(self) -> bool:
        """Whether every rank scores a part of them; else the first one scores all."""

    def scores(self, answers: Sequence[Answer]) -> Sequence[float]:
        """A number for each."""


@dataclass(frozen=True)
class ModelScorer:
    """A model that scores texts; every rank has it whole.

    Attributes:
        head: the number of the score that counts.
    """

    model: RewardModel
    head: int
    shared: bool = True

    def scores(self, answers: Sequence[Answer]) -> Sequence[float]:
        texts = [self._tokens(answer) for answer in answers]
        found: list[float] = self.model.scores(texts)[:, self.head].tolist() if texts else []
        return found

    def _tokens(self, answer: Answer) -> list[int]:
        prompt = answer.prompt
        if prompt.opening:
            return self.model.tokens("", prompt.text + answer.text)
        return self.model.tokens(prompt.text, answer.text)


@dataclass(frozen=True)
class CalledScorer:
    """A function of prompts and responses, called by the first rank alone, in a thread.

    Raises:
        StageError: by ``scores``, if the function raises, does not return in time, or returns
            anything else than a finite number for each response.
    """

    function: Callable[[list[str], list[str]], Any]
    timeout_seconds: float
    shared: bool = False

    def scores(self, answers: Sequence[Answer]) -> Sequence[float]:
        prompts = [answer.prompt.text for answer in answers]
        found: list[Any] = []
        failed: list[BaseException] = []

        def call() -> None:
            try:
                found.append(self.function(prompts, [answer.text for answer in answers]))
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(self.timeout_seconds)
        if thread.is_alive():
            raise StageError(f"no answer after {self.timeout_seconds} s (timeout_seconds)")
        if failed:
            raise StageError(_in_one_line(failed[0])) from failed[0]
        return _as_floats(found[0])


def _as_floats(found: Any) -> list[float]:
    try:
        return [float(score) for score in found]
    except (TypeError, ValueError):
        raise StageError(f"returned {type(found).__name__}, not numbers") from None


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, LlmscaleError):
        return str(error)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"raised {type(error).__name__}: {first}"


def function_named(name: str) -> Callable[[list[str], list[str]], Any]:
    """The function ``MODULE:FUNCTION`` or ``FILE.py:FUNCTION``.

    Raises:
        RecipeError: if there is none.
    """
    place, _, function = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None, "a file of Python"
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as error:
        raise RecipeError(f"{name}: cannot be imported: {_in_one_line(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise RecipeError(f"{name}: {place} has no function {function}")
    return found


def endpoint(url: str, timeout_seconds: float) -> Callable[[list[str], list[str]], Any]:
    """A function that asks a URL; it is sent ``{"prompts": [...], "responses": [...]}``."""

    def ask(prompts: list[str], responses: list[str]) -> Any:
        body = json.dumps({"prompts": prompts, "responses": responses}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_seconds) as answer:
                return json.load(answer)["scores"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StageError(f"{type(error).__name__}: {error}") from None

    return ask


@dataclass(frozen=True)
class Scores:
    """What answers are worth: in all, and by each source."""

    total_n: list[float]
    parts: Mapping[str, list[float]]


@dataclass(frozen=True)
class WeighedScorers:
    """The sum of several scorers by their weights.

    Attributes:
        without_end: the score in all of an answer that was cut off; None for its own.
    """

    scorers: Mapping[str, Scorer]
    weights: Mapping[str, float]
    without_end: float | None

    def scores(self, answers: Sequence[Answer]) -> Scores:
        """The same on every rank; collective.

        Raises:
            StageError: names the source that gave anything else than a finite number for each.
        """
        parts = {name: _from(name, scorer, answers) for name, scorer in self.scorers.items()}
        total_n = [
            sum(self.weights[name] * part[number] for name, part in parts.items())
            for number in range(len(answers))
        ]
        if self.without_end is not None:
            total_n = [
                score if answer.ended else self.without_end
                for score, answer in zip(total_n, answers, strict=True)
            ]
        return Scores(total_n, parts)


def _from(name: str, scorer: Scorer, answers: Sequence[Answer]) -> list[float]:
    """One source's scores on every rank; what goes wrong on one, all of them say."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    own = range(rank, len(answers), ranks) if scorer.shared else range(len(answers))
    said: Any = {}
    if scorer.shared or rank == 0:
        said = _own_scores(scorer, [answers[number] for number in own], own)
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, said)
    wrong = next((part for part in everyone if isinstance(part, str)), None)
    if wrong is not None:
        raise StageError(f"rewards.{name}: {wrong}; the policy was not updated with it")
    found = {number: score for part in everyone for number, score in part.items()}
    return [found[number] for number in range(len(answers))]


def _own_scores(
    scorer: Scorer, answers: Sequence[Answer], numbers: Sequence[int]
) -> dict[int, float] | str:
    """A rank's scores by the answers' numbers, or what is wrong with them."""
    try:
        scores = scorer.scores(answers)
    except LlmscaleError as error:
        return str(error)
    if len(scores) != len(answers):
        return f"{len(scores)} scores for {len(answers)} answers"
    for number, score in zip(numbers, scores, strict=True):
        if not math.isfinite(score):
            return f"the score of answer {number + 1} is {score}"
    return dict(zip(numbers, scores, strict=True))
