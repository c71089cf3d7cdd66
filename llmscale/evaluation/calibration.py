"""How far predicted preferences can be believed.

Shape legend: n pairs.
"""

from typing import Any

import numpy as np

BINS = 10


def calibration(differences_n: np.ndarray) -> dict[str, Any]:
    """Of pairs' score differences, the better minus the worse: how often and how surely right.

    The confidence in a pair is the Bradley-Terry probability of the text with the higher score,
    in [0.5, 1]. The calibration error is the mean distance of confidence and accuracy over equal
    bins of confidence, weighed by their pairs (Guo et al. 2017, equation 3).

    Returns:
        ``accuracy``, ``calibration_error``, and of each bin that has pairs its number,
        confidence and accuracy.
    """
    right_n = differences_n > 0
    confidence_n = 1 / (1 + np.exp(-np.abs(differences_n)))
    bin_n = np.minimum(((confidence_n - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins = [
        {
            "pairs": int(own.sum()),
            "confidence": float(confidence_n[own].mean()),
            "accuracy": float(right_n[own].mean()),
        }
        for number in range(BINS)
        if (own := bin_n == number).any()
    ]
    error = sum(one["pairs"] * abs(one["confidence"] - one["accuracy"]) for one in bins)
    return {
        "accuracy": float(right_n.mean()),
        "calibration_error": error / len(differences_n),
        "calibration": bins,
    }
