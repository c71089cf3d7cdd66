"""What counts as a difference: too much, nothing at all, and what is no number."""

import math
from typing import Any

import pytest

from llmscale.verify.verdict import curve_checks, tensor_check


def one(tensor: str = "a", **more: Any) -> dict[str, Any]:
    return {
        "step": 1,
        "position": 0,
        "what": "parameter",
        "tensor": tensor,
        "rank": 0,
        "place": "whole",
        "difference": 0.0,
        "scale": 1.0,
        **more,
    }


def test_equal_tensors_agree() -> None:
    assert tensor_check("parameters", [one()], ["a"], None).agrees


@pytest.mark.parametrize("key", ["difference", "scale"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_differs(key: str, value: float) -> None:
    for what in ("parameter", "gradient", "export"):
        found = [one(what=what), one("b", what=what, **{key: value})]
        check = tensor_check("gradients", found, ["a", "b"], None)
        assert not check.agrees
        assert "b" in check.where


def test_a_tensor_that_no_rank_holds_is_named() -> None:
    check = tensor_check("parameters", [one("a + c")], ["a", "b", "c"], None)
    assert not check.agrees
    assert check.where == "no rank holds b"
    assert not tensor_check("parameters", [], ["a"], None).agrees


@pytest.mark.parametrize(("ours", "reference"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0)])
def test_a_curve_that_is_no_number_differs(ours: float, reference: float) -> None:
    curves = [
        [{"tokens": 4, "loss": 1.0, "gradient_norm": 1.0}, {"tokens": 4, "loss": loss}]
        for loss in (ours, reference)
    ]
    for curve in curves:
        curve[1]["gradient_norm"] = 1.0
    tokens, loss, norm = curve_checks(*curves)
    assert tokens.agrees
    assert norm.agrees
    assert not loss.agrees
    assert loss.where == "from step 2 on"


def test_the_wrong_tensor_nearest_to_the_output_is_told_while_the_loss_is_right() -> None:
    found = [
        one("first", position=0, difference=1e-3),
        one("last", position=2, difference=1e-4),
        one("between", position=1, difference=1e-3),
    ]
    names = ["first", "last", "between"]
    assert "last" in tensor_check("parameters", found, names, None).where
    assert "last" in tensor_check("parameters", found, names, 2).where
    assert "first" in tensor_check("parameters", found, names, 1).where
