"""Figures of answers: as counted by hand, or by libraries that count otherwise."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import f1_score
from torchmetrics.functional.classification import binary_calibration_error

from llmscale.evaluation.bootstrap import interval, mean_interval
from llmscale.evaluation.calibration import reliability
from llmscale.evaluation.figures import (
    Answers,
    answer_figures,
    group_figures,
    kept_figures,
    macro_f1,
)

RIGHT = ["cat", "cat", "cat", "cat", "dog", "dog", "hen", "hen", "hen", "hen"]
GIVEN = ["cat", "cat", "dog", "", "dog", "cat", "hen", "hen", "hen", "dog"]
ANSWERS = Answers(["cat", "dog", "hen"], RIGHT, GIVEN)


def test_accuracy_f1_and_confusion_are_those_counted_by_hand() -> None:
    found = answer_figures(ANSWERS, seed=1)
    assert found["accuracy"] == pytest.approx(6 / 10)
    assert found["largest_label"] == pytest.approx(4 / 10)
    # 2 hits / (2 hits + false findings + misses): cat 4/(4+1+2), dog 2/(2+2+1), hen 6/(6+0+1).
    assert found["f1"] == pytest.approx((4 / 7 + 2 / 5 + 6 / 7) / 3)
    assert found["unanswered"] == 1
    assert found["confusion"] == {
        "cat": {"cat": 2, "dog": 1, "hen": 0, "unanswered": 1},
        "dog": {"cat": 1, "dog": 1, "hen": 0, "unanswered": 0},
        "hen": {"cat": 0, "dog": 1, "hen": 3, "unanswered": 0},
    }
    for figure in ("accuracy", "f1"):
        low, high = found[f"{figure}_interval"]
        assert 0 <= low < found[figure] < high <= 1
    assert answer_figures(ANSWERS, seed=1) == found
    assert "calibration_error" not in found


def test_the_f1_that_is_resampled_is_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    for labels in (2, 3, 7):
        right_n = generator.integers(0, labels, 12)
        given_n = generator.integers(-1, labels, 12)
        expected = f1_score(
            right_n, given_n, labels=range(labels), average="macro", zero_division=np.nan
        )
        assert macro_f1(right_n, given_n, labels) == pytest.approx(expected)


def test_the_calibration_error_is_torchmetrics_own() -> None:
    generator = np.random.default_rng(0)
    confidence_n = generator.uniform(0.3, 1, 500)
    right_n = (generator.uniform(size=500) < confidence_n**2).astype(float)
    error, bins = reliability(confidence_n, right_n)
    expected = binary_calibration_error(
        torch.tensor(confidence_n), torch.tensor(right_n).int(), n_bins=10, norm="l1"
    )
    assert error == pytest.approx(float(expected), abs=1e-6)
    assert sum(one["samples"] for one in bins) == 500


def test_an_interval_is_scipys_within_resampling_noise() -> None:
    values_n = np.random.default_rng(3).exponential(size=200)
    expected = stats.bootstrap(
        (values_n,), np.mean, method="percentile", n_resamples=5000, rng=0
    ).confidence_interval
    assert mean_interval(values_n, seed=5) == pytest.approx(tuple(expected), abs=0.02)
    assert mean_interval(values_n, seed=5) == mean_interval(values_n, seed=5)


def test_groups_are_resampled_apart() -> None:
    sizes = []
    interval(lambda drawn: sizes.append((drawn < 3).sum()) or 0.0, ["a"] * 3 + ["b"] * 9, seed=0)
    assert set(sizes) == {3}


def test_gaps_between_groups_are_those_counted_by_hand() -> None:
    groups = ["x", "x", "x", "x", "x", "y", "y", "y", "y", "y"]
    found = group_figures(ANSWERS, groups, seed=1)
    assert found["groups"]["x"]["accuracy"] == pytest.approx(3 / 5)
    assert found["groups"]["y"]["accuracy"] == pytest.approx(3 / 5)
    assert found["accuracy_gap"] == 0
    # hen is answered to none of x, and to three of five of y.
    assert found["answer_gap"] == pytest.approx(3 / 5)
    apart = group_figures(ANSWERS, ["x"] * 2 + ["y"] * 8, seed=1)
    assert apart["accuracy_gap"] == pytest.approx(1 - 4 / 8)
    low, high = apart["accuracy_gap_interval"]
    assert low < apart["accuracy_gap"] < high


def test_accuracy_kept_is_relative_to_what_there_was() -> None:
    after = Answers(ANSWERS.labels, RIGHT, ["dog", *GIVEN[1:]])
    found = kept_figures(ANSWERS, after, seed=1)
    assert found["accuracy"] == pytest.approx(5 / 10)
    assert found["accuracy_kept"] == pytest.approx(5 / 6)
    assert found["answers_changed"] == pytest.approx(1 / 10)
    nothing = Answers(ANSWERS.labels, RIGHT, [""] * 10)
    assert "accuracy_kept" not in kept_figures(nothing, nothing, seed=1)
