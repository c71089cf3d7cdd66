"""How far a model's confidence can be believed.

Shape legend: n pairs or texts.
"""

from typing import Any

import numpy as np

BINS = 10


def reliability(
    confidence_n: np.ndarray, right_n: np.ndarray, lowest: float = 0.0
) -> tuple[float, list[dict[str, Any]]]:
    """The calibration error, and what it is made of.

    It is the mean distance of confidence and accuracy over equal bins of confidence, from the
    lowest there can be to 1, weighed by their samples (Guo et al. 2017, equation 3).

    Returns:
        The error, and of each bin that has samples their number, confidence and accuracy.
    """
    bin_n = np.minimum(((confidence_n - lowest) / (1 - lowest) * BINS).astype(int), BINS - 1)
    bins = [
        {
            "samples": int(own.sum()),
            "confidence": float(confidence_n[own].mean()),
            "accuracy": float(right_n[own].mean()),
        }
        for number in range(BINS)
        if (own := bin_n == number).any()
    ]
    error = sum(one["samples"] * abs(one["confidence"] - one["accuracy"]) for one in bins)
    return error / len(confidence_n), bins


def calibration(differences_n: np.ndarray) -> dict[str, Any]:
    """Of pairs' score differences, the better minus the worse: how often and how surely right.

    The confidence in a pair is the Bradley-Terry probability of the text with the higher score,
    in [0.5, 1].

    Returns:
        ``accuracy``, ``calibration_error``, and of each bin that has pairs its number,
        confidence and accuracy.
    """
    right_n = differences_n > 0
    confidence_n = 1 / (1 + np.exp(-np.abs(differences_n)))
    error, bins = reliability(confidence_n, right_n, lowest=0.5)
    return {
        "accuracy": float(right_n.mean()),
        "calibration_error": error,
        "calibration": [{"pairs": one.pop("samples"), **one} for one in bins],
    }
