"""Fitting the constants to measured steps."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from llmscale.planning.constants import PLAUSIBLE, Constants
from llmscale.planning.setup import Setup
from llmscale.planning.step_time import step_time

LARGEST_ERROR = 0.25
"""Of a logarithm: errors beyond count linearly (Huber 1964), since some rows are in error."""
NUDGE = 0.02


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
    ranges = [PLAUSIBLE[name] for name in names]
    low = numpy.log([each.low for each in ranges])
    high = numpy.log([each.high for each in ranges])
    middle, spread = (low + high) / 2, (high - low) / 4
    if centre is not None:
        middle = numpy.log([getattr(centre, name) for name in names])
    pull = noise / spread

    def errors(logs: "numpy.ndarray", simulated: bool = False) -> "numpy.ndarray":
        values = dict(zip(names, map(float, numpy.exp(logs)), strict=True))
        constants = start.changed(values)
        return numpy.array(
            [
                math.log(step_time(row.setup, constants, simulated=simulated).total / row.seconds)
                for row in measured
            ]
        )

    at = numpy.log([getattr(start, name) for name in names])
    nudges = NUDGE * numpy.eye(len(at))
    for number in range(rounds):
        now = errors(at, simulated=True)
        if number in (0, rounds // 2):  # slopes of logarithms hardly change
            near = errors(at)
            slopes = numpy.stack([(errors(at + nudge) - near) / NUDGE for nudge in nudges], axis=1)
        robust = weights * numpy.sqrt(
            numpy.minimum(1.0, LARGEST_ERROR / numpy.maximum(numpy.abs(now), 1e-9))
        )
        matrix = numpy.concatenate([slopes * robust[:, None], numpy.diag(pull)])
        target = numpy.concatenate([-now * robust, (middle - at) * pull])
        step, *_ = numpy.linalg.lstsq(matrix, target, rcond=None)
        at = numpy.clip(at + numpy.clip(step, -0.3, 0.3), low, high)
    return start.changed(dict(zip(names, map(float, numpy.exp(at)), strict=True)))
