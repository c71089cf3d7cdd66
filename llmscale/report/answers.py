"""Answers of a policy as a page shows them: to held-out prompts, and the best and worst sampled.

The files may be long: they are read a line at a time, and little of them is kept.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from pathlib import Path
from typing import Any

PROMPTS_SHOWN = 8
EXTREMES_SHOWN = 3
MOST_CHARACTERS = 1200

Line = Mapping[str, Any]


@dataclass(frozen=True)
class ShownAnswer:
    """What a policy answered after so many iterations, and what that was worth, by source."""

    step: int
    text: str
    reward: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class ShownPrompt:
    """A prompt and its answers, the earlier one first."""

    prompt: str
    answers: Sequence[ShownAnswer]


@dataclass
class _Step:
    """The first answers of a step that were noted."""

    step: int
    lines: list[Line] = field(default_factory=list)


def held_out_answers(file: Path) -> list[ShownPrompt]:
    """The first held-out prompts with their first answers and their last.

    Every validation answers the same prompts in the same order.
    """
    first = last = whole = None
    for line in _lines(file):
        if last is None or line["step"] != last.step:
            whole, last = last, _Step(line["step"])
            first = first or last
        if len(last.lines) < PROMPTS_SHOWN:
            last.lines.append(line)
    if first is None or last is None:
        return []
    if whole is not None and len(last.lines) < len(first.lines):  # still being written
        last = whole
    moments = [first] if first is last else [first, last]
    return [
        ShownPrompt(_cut(asked["prompt"]), [_shown(moment.lines[number]) for moment in moments])
        for number, asked in enumerate(first.lines)
    ]


def extreme_answers(file: Path) -> list[ShownPrompt]:
    """Of the last iteration whose answers were noted, those worth most, then those worth least."""
    step = -1
    best: list[Line] = []
    worst: list[Line] = []
    for line in _lines(file):
        if line["step"] != step:
            step, best, worst = line["step"], [], []
        best = nlargest(EXTREMES_SHOWN, [*best, line], key=_worth)
        worst = nlargest(EXTREMES_SHOWN, [*worst, line], key=lambda one: -_worth(one))
    apart = [line for line in reversed(worst) if not any(line is one for one in best)]
    return [ShownPrompt(_cut(line["prompt"]), [_shown(line)]) for line in [*best, *apart]]


def _lines(file: Path) -> Iterator[Line]:
    """All but a last line that is still being written."""
    if not file.exists():
        return
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def _worth(line: Line) -> float:
    return float(line["reward"])


def _shown(line: Line) -> ShownAnswer:
    parts = {
        name.removeprefix("reward_").replace("_", " "): value
        for name, value in line.items()
        if name.startswith("reward_")
    }
    return ShownAnswer(line["step"], _cut(line["answer"]), line["reward"], parts)


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} …"
