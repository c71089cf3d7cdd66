"""Fitting the constants to measured steps."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from llmscale.planning.constants import PLAUSIBLE, Constants
from llmscale.planning.setup import Setup
from llmscale.planning.step_time import step_time

if TYPE_CHECKING:
    import numpy

LARGEST_ERROR = 0.25
"""Of a logarithm: errors beyond count linearly (Huber 1964), since some rows are in error."""
NUDGE, LARGEST_STEP = 0.02, 0.3


class Measured(NamedTuple):
    """A step that somebody timed; ``source`` is whose."""

    setup: Setup
    seconds: float
    source: str


def fit(
    measured: Sequence[Measured],
    start: Constants,
    names: Sequence[str],
    rounds: int = 5,
    centre: Constants | None = None,
    noise: float = 0.1,
) -> Constants:
    """The constants with the smallest squared errors of the logarithm of step time.

    By Gauss and Newton in logarithms, each constant held within its plausible range and drawn
    towards the range's middle, or ``centre``. A source counts by the square root of its rows.

    Args:
        noise: of a measurement, as a logarithm; the smaller, the less constants are drawn back.
    """
    import numpy

    counts = Counter(row.source for row in measured)
    weights = numpy.array([counts[row.source] ** -0.25 for row in measured])
    low, high = (numpy.log([PLAUSIBLE[name][side] for name in names]) for side in (0, 1))
    middle = (low + high) / 2 if centre is None else _logs(centre, names)
    pull = noise * 4 / (high - low)
    at = _logs(start, names)
    for number in range(rounds):
        now = _errors(measured, _at(start, names, at), simulated=True)
        if number in (0, rounds // 2):  # slopes of logarithms hardly change
            slopes = _slopes(measured, start, names, at)
        far = LARGEST_ERROR / numpy.maximum(numpy.abs(now), 1e-9)
        robust = weights * numpy.sqrt(numpy.minimum(1.0, far))
        matrix = numpy.concatenate([slopes * robust[:, None], numpy.diag(pull)])
        target = numpy.concatenate([-now * robust, (middle - at) * pull])
        step, *_ = numpy.linalg.lstsq(matrix, target, rcond=None)
        at = numpy.clip(at + numpy.clip(step, -LARGEST_STEP, LARGEST_STEP), low, high)
    return _at(start, names, at)


def _logs(constants: Constants, names: Sequence[str]) -> "numpy.ndarray":
    import numpy

    return numpy.log([getattr(constants, name) for name in names])


def _at(start: Constants, names: Sequence[str], logs: "numpy.ndarray") -> Constants:
    """The constants whose logarithms these are."""
    return start.changed({name: math.exp(log) for name, log in zip(names, logs, strict=True)})


def _errors(
    measured: Sequence[Measured], constants: Constants, *, simulated: bool
) -> "numpy.ndarray":
    """Of each row, the logarithm of predicted over measured seconds."""
    import numpy

    predicted = (step_time(row.setup, constants, simulated=simulated).total for row in measured)
    pairs = zip(predicted, measured, strict=True)
    return numpy.array([math.log(seconds / row.seconds) for seconds, row in pairs])


def _slopes(
    measured: Sequence[Measured], start: Constants, names: Sequence[str], at: "numpy.ndarray"
) -> "numpy.ndarray":
    """Of each row's error by each constant, both as logarithms; schedules by the closed form."""
    import numpy

    near = _errors(measured, _at(start, names, at), simulated=False)
    columns = []
    for nudge in NUDGE * numpy.eye(len(at)):
        further = _errors(measured, _at(start, names, at + nudge), simulated=False)
        columns.append((further - near) / NUDGE)
    return numpy.stack(columns, axis=1)
