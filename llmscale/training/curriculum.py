"""Phases of training: from which step on samples have which length and come from where.

All of it is a function of the recipe alone; a checkpoint holds no more than its step and the
number of samples consumed.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt

from llmscale.data.blend import Blend, whole_shares
from llmscale.settings import Problem, Settings
from llmscale.training.settings import Batch


def _that_repeat(weights: dict[str, float]) -> dict[str, float]:
    whole_shares(weights)
    return weights


Weights = Annotated[dict[str, PositiveFloat], Field(min_length=1), AfterValidator(_that_repeat)]
"""Corpora by name, each with its part of the samples; the weights need not sum to 1."""


class Phase(Settings):
    """A number of steps (the last phase lasts to the end) with a length and a blend.

    What a phase leaves out is as the stage has it.
    """

    steps: PositiveInt | None = None
    sequence_length: PositiveInt | None = None
    blend: Weights | None = None


@dataclass(frozen=True)
class PlacedPhase:
    """A phase as it runs: where it begins, and what its samples are.

    ``read`` counts the samples of each corpus that earlier phases of the same length have
    read; this one goes on behind them. Another length cuts other samples, and begins anew.
    """

    first_step: int
    first_sample: int
    sequence_length: int
    weights: Mapping[str, float]
    read: Mapping[str, int]


def lay_out(
    phases: Sequence[Phase], batch: Batch, sequence_length: int, weights: Mapping[str, float]
) -> tuple[PlacedPhase, ...]:
    """The phases one behind the other; without any, one that lasts from start to end.

    Args:
        sequence_length: of phases that name none.
        weights: the blend of phases that name none.
    """
    placed = []
    step = sample = 0
    read: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for phase in phases or (Phase(),):
        length, blend = phase.sequence_length or sequence_length, phase.blend or weights
        placed.append(PlacedPhase(step, sample, length, blend, dict(read[length])))
        step += phase.steps or 0
        end = batch.consumed(step)
        read[length].update(Blend(blend).counts(max(0, end - sample)))
        sample = end
    return tuple(placed)


def step_problems(phases: Sequence[Phase], steps: int) -> Iterator[Problem]:
    """What keeps the phases from filling ``steps`` steps; paths begin at a phase's number."""
    before = 0
    for number, phase in enumerate(phases):
        path, last = (str(number), "steps"), number == len(phases) - 1
        if last and phase.steps is not None:
            yield Problem(path, "the last phase lasts to the end; remove it")
        elif not last and phase.steps is None:
            yield Problem(path, "is missing; add it, as only the last phase lasts to the end")
        before += phase.steps or 0
        if not last and before >= steps:
            yield Problem(
                path,
                f"the phases up to this one take {before} of {steps} steps; "
                "lower it, or raise the stage's steps",
            )
            return
