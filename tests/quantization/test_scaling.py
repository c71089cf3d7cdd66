"""Scales take outliers out of inputs that are rounded.

Shape legend: n tokens, o outputs, i inputs.
"""

import pytest
import torch
from torch import Tensor

from llmscale.quantization.inputs import SAMPLES_A_WINDOW, InputStatistics
from llmscale.quantization.layers import Recipe, quantize_layers
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
    statistics = InputStatistics(COLUMNS, recipe.scheme.by_products, recipe.scheme.by_magnitudes)
    for window_ni in inputs_ni.split(SAMPLES_A_WINDOW):
        statistics.add(window_ni)
    found = quantize_layers({"layer": weight_oi}, recipe, statistics, torch.arange(COLUMNS))
    static_scale = found.layers["layer"].input_scale

    def error(scales_i: Tensor) -> float:
        """Of the outputs, with inputs in 8 bits and weights as they are."""
        scaled_ni = inputs_ni / scales_i
        largest = scaled_ni.abs()
        step = (largest.amax(1, True) if static_scale is None else largest.amax()) / 127.5
        rounded_ni = (scaled_ni / step).round().clamp(-128, 127) * step
        return float((rounded_ni @ (weight_oi * scales_i).T - inputs_ni @ weight_oi.T).norm())

    assert found.scales_i is not None
    inputs_i, weights_i = inputs_ni.abs().amax(0), weight_oi.abs().amax(0)
    powers = [up / 10 for up in range(10)]
    least = min(error(inputs_i**up / weights_i ** (1 - up)) for up in powers)
    assert error(found.scales_i) <= 1.1 * least < 0.2 * error(torch.ones(COLUMNS))
    if static_scale is not None:
        expected = (inputs_ni / found.scales_i).abs().max() / 127.5
        torch.testing.assert_close(static_scale, expected.reshape(1))
