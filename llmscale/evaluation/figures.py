"""What answers are worth, as figures: right ones, confusion, calibration, groups.

Shape legend: n texts, l labels.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmscale.evaluation.bootstrap import interval, mean_interval
from llmscale.evaluation.calibration import reliability
from llmscale.evaluation.packages import package

UNANSWERED = "unanswered"
"""What stands in a confusion matrix for an answer that names no label."""


@dataclass(frozen=True)
class Answers:
    """What a model answered, beside what is right.

    Attributes:
        labels: all that there are, in order.
        right: of each text, the label it has.
        given: the label that was answered; empty where none was.
        confidence_n: how sure of it the model was, in [0, 1]; None where it does not say.
    """

    labels: Sequence[str]
    right: Sequence[str]
    given: Sequence[str]
    confidence_n: np.ndarray | None = None

    @property
    def hits_n(self) -> np.ndarray:
        """1 where the answer is right, else 0."""
        return np.array([a == b for a, b in zip(self.right, self.given, strict=True)], dtype=float)


def answer_figures(answers: Answers, seed: int) -> dict[str, Any]:
    """Accuracy and macro F1 with 95 % intervals, the confusion matrix, and the calibration.

    ``largest_label`` is the accuracy of always answering the most frequent label. F1 is the mean
    over labels. ``confusion`` says of each label what texts that have it were taken for.

    Raises:
        MachineError: if scikit-learn is missing.
    """
    hits_n = answers.hits_n
    figures: dict[str, Any] = {
        "texts": len(hits_n),
        "accuracy": float(hits_n.mean()),
        "accuracy_interval": mean_interval(hits_n, seed),
        "largest_label": Counter(answers.right).most_common(1)[0][1] / len(hits_n),
        **_f1(answers, seed),
    }
    if missing := sum(not label for label in answers.given):
        figures["unanswered"] = missing
    if answers.confidence_n is not None:
        error, bins = reliability(answers.confidence_n, hits_n)
        figures |= {
            "confidence": float(answers.confidence_n.mean()),
            "calibration_error": error,
            "reliability": bins,
        }
    return figures | {"confusion": confusion(answers)}


def _f1(answers: Answers, seed: int) -> dict[str, Any]:
    """An answer without a label is a miss of the right one, and a false finding of none."""
    metrics = package("sklearn.metrics", "classification")
    known = {label: number for number, label in enumerate(answers.labels)}
    right_n = np.array([known[label] for label in answers.right])
    given_n = np.array([known.get(label, -1) for label in answers.given])
    value = metrics.f1_score(
        right_n, given_n, labels=range(len(known)), average="macro", zero_division=np.nan
    )

    def resampled(drawn: np.ndarray) -> float:
        return macro_f1(right_n[drawn], given_n[drawn], len(known))

    return {"f1": float(value), "f1_interval": interval(resampled, [0] * len(right_n), seed)}


def macro_f1(right_n: np.ndarray, given_n: np.ndarray, labels: int) -> float:
    """scikit-learn's macro F1 a hundred times as fast, for resampling.

    Args:
        right_n: numbers of labels.
        given_n: the same, or -1 for none.
        labels: how many there are; those of no text are left out of the mean.
    """
    hits_l = np.bincount(right_n[right_n == given_n], minlength=labels)
    found_l = np.bincount(right_n, minlength=labels) + np.bincount(
        given_n[given_n >= 0], minlength=labels
    )
    return float((2 * hits_l[found_l > 0] / found_l[found_l > 0]).mean())


def confusion(answers: Answers) -> dict[str, dict[str, int]]:
    """How many texts of each label (the outer one) got which label as an answer."""
    metrics = package("sklearn.metrics", "classification")
    given = [label or UNANSWERED for label in answers.given]
    columns = [*answers.labels, *({UNANSWERED} & set(given) - set(answers.labels))]
    counts = metrics.confusion_matrix(answers.right, given, labels=columns)
    rows = zip(answers.labels, counts[: len(answers.labels)], strict=True)
    return {
        label: {column: int(count) for column, count in zip(columns, row, strict=True)}
        for label, row in rows
    }


def kept_figures(before: Answers, after: Answers, seed: int) -> dict[str, Any]:
    """Accuracy on texts that were changed: what is left of it, and how many answers changed."""
    before_n, after_n = before.hits_n, after.hits_n

    def kept(drawn: np.ndarray) -> float:
        first = before_n[drawn].sum()
        return float(after_n[drawn].sum() / first) if first else float("nan")

    figures: dict[str, Any] = {
        "accuracy": float(after_n.mean()),
        "accuracy_interval": mean_interval(after_n, seed),
        "answers_changed": float(
            np.mean([a != b for a, b in zip(before.given, after.given, strict=True)])
        ),
    }
    if before_n.any():
        figures["accuracy_kept"] = kept(np.arange(len(before_n)))
        figures["accuracy_kept_interval"] = interval(kept, [0] * len(before_n), seed)
    return figures


def group_figures(answers: Answers, groups: Sequence[str], seed: int) -> dict[str, Any]:
    """Accuracy in each group, and the gap between the group it is best and worst in.

    ``answer_gap`` is the largest difference between groups in how often a label is answered:
    without regard to what is right (demographic parity).
    """
    hits_n, names = answers.hits_n, sorted(set(groups))
    groups_n = np.array([names.index(group) for group in groups])
    given_nl = np.array([[given == label for label in answers.labels] for given in answers.given])

    def gap(drawn: np.ndarray) -> float:
        own = groups_n[drawn]
        means = [hits_n[drawn][own == number].mean() for number in range(len(names))]
        return float(max(means) - min(means))

    shares = np.stack([given_nl[groups_n == number].mean(0) for number in range(len(names))])
    return {
        "groups": {
            name: {
                "texts": int((groups_n == number).sum()),
                "accuracy": float(hits_n[groups_n == number].mean()),
                "accuracy_interval": mean_interval(hits_n[groups_n == number], seed),
            }
            for number, name in enumerate(names)
        },
        "accuracy_gap": gap(np.arange(len(hits_n))),
        "accuracy_gap_interval": interval(gap, groups, seed),
        "answer_gap": float((shares.max(0) - shares.min(0)).max()),
    }
