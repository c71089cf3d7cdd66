"""Confidence intervals by resampling (Efron 1979)."""

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 1000
COVERED = (0.025, 0.975)


def interval(
    statistic: Callable[[np.ndarray], float], strata: Sequence[object], seed: int
) -> list[float]:
    """The 95 % percentile interval of a figure over resampled samples.

    Args:
        statistic: the figure of the samples with these numbers; some come several times.
        strata: what each sample belongs to; of each as many are drawn as there are.

    Returns:
        Its lower and its upper end.
    """
    generator = np.random.default_rng(seed)
    names = np.array([str(stratum) for stratum in strata])
    members = [np.flatnonzero(names == name) for name in sorted(set(names))]
    values = [
        statistic(np.concatenate([generator.choice(own, len(own)) for own in members]))
        for _ in range(RESAMPLES)
    ]
    return [float(end) for end in np.nanquantile(values, COVERED)]


def mean_interval(values: np.ndarray, seed: int) -> list[float]:
    """The interval of a mean."""
    return interval(lambda drawn: float(values[drawn].mean()), [0] * len(values), seed)
