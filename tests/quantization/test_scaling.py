"""Scales take outliers out of inputs that are rounded.

Shape legend: n tokens, o outputs, i inputs.
"""

import pytest
import torch
from torch import Tensor

from llmscale.quantization.inputs import SAMPLES_A_WINDOW, InputStatistics
from llmscale.quantization.layers import LARGEST_NOISE, Recipe, quantize_layers
from llmscale.quantization.schemes import Quantization, SchemeName

COLUMNS = 64


@pytest.mark.parametrize("scheme", ["int8-static", "int8-smoothquant"])
def test_scales_are_those_of_least_error_with_rounded_inputs(scheme: SchemeName) -> None:
    random = torch.Generator().manual_seed(2)
    inputs_ni = torch.randn(256, COLUMNS, generator=random)
    inputs_ni[::32, 5::20] *= 300
    weight_oi = torch.randn(32, COLUMNS, generator=random)
    weight_oi[:, 5::20] /= 300
    recipe = Recipe(Quantization(scheme=scheme).composition(), None, torch.float32)
    statistics = InputStatistics(COLUMNS, recipe.scheme.by_products, recipe.scheme.by_range)
    for window_ni in inputs_ni.split(SAMPLES_A_WINDOW):
        statistics.add(window_ni)
    found = quantize_layers({"layer": weight_oi}, recipe, statistics, torch.arange(COLUMNS))
    fixed = found.layers["layer"].inputs

    def rounded(scaled_ni: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In 8 bits from the least to the greatest, of a token or of all; the step and the zero."""
        ends = [scaled_ni.amin(1, True), scaled_ni.amax(1, True)]
        least, most = ends if fixed is None else (ends[0].min(), ends[1].max())
        step = (most - least) / 255
        zero = (-128 - least / step).round()
        return ((scaled_ni / step).round() + zero).clamp(-128, 127).sub(zero) * step, step, zero

    def error(scales_i: Tensor) -> float:
        """Of the outputs, with inputs in 8 bits and weights as they are."""
        rounded_ni = rounded(inputs_ni / scales_i)[0]
        return float((rounded_ni @ (weight_oi * scales_i).T - inputs_ni @ weight_oi.T).norm())

    assert (fixed is None) is (scheme == "int8-smoothquant")
    assert found.scales_i is not None
    inputs_i, weights_i = inputs_ni.abs().amax(0), weight_oi.abs().amax(0)
    powers = [up / 10 for up in range(10)]
    least = min(error(inputs_i**up / weights_i ** (1 - up)) for up in powers)
    assert error(found.scales_i) <= 1.1 * least < 0.2 * error(torch.ones(COLUMNS))
    if fixed is not None:
        _, step, zero = rounded(inputs_ni / found.scales_i)
        assert fixed.zero is not None
        torch.testing.assert_close(fixed.scale, step.reshape(1))
        torch.testing.assert_close(fixed.zero, zero.reshape(1))


@pytest.mark.parametrize("outlier", [1, 5, 12, 14, 16, 18, 20, 60])
def test_inputs_that_one_scale_does_not_serve_have_one_a_token(outlier: float) -> None:
    random = torch.Generator().manual_seed(3)
    inputs_ni = torch.randn(64, COLUMNS, generator=random)
    inputs_ni[7, 9], inputs_ni[8, 3] = outlier, -outlier
    weight_oi = torch.randn(32, COLUMNS, generator=random)
    step = (inputs_ni.max() - inputs_ni.min()) / 255
    zero = (-128 - inputs_ni.min() / step).round()
    rounded_ni = ((inputs_ni / step + zero).round().clamp(-128, 127) - zero) * step
    wrong_no, wanted_no = (rounded_ni - inputs_ni) @ weight_oi.T, inputs_ni @ weight_oi.T
    noise = float(wrong_no.square().sum() / wanted_no.square().sum())

    recipe = Recipe(Quantization(scheme="int8-static").composition(), None, torch.float32)
    statistics = InputStatistics(COLUMNS, with_products=True, with_range=True)
    for window_ni in inputs_ni.split(SAMPLES_A_WINDOW):
        statistics.add(window_ni)
    found = quantize_layers({"layer": weight_oi}, recipe, statistics).layers["layer"]
    assert (found.inputs is None) is (noise > LARGEST_NOISE)
