"""Inputs of layers are rounded in Transformers as they are where schemes are chosen."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from llmscale.quantization.activations import InputGrid, input_grid, token_grid
from llmscale.quantization.quantize import quantize
from llmscale.quantization.schemes import SCHEMES, ActivationFormat, Quantization, SchemeName
from tests.quantization.small import TEXT, small_llama

INT8, FP8 = ActivationFormat(True), ActivationFormat(True, number="float")


@pytest.mark.parametrize("name", [name for name, one in SCHEMES.items() if one.activations])
@torch.no_grad()
def test_transformers_rounds_inputs_alike(name: SchemeName, tmp_path: Path) -> None:
    texts = [TEXT.read_text(encoding="utf-8")[:8000]] if SCHEMES[name].calibrated else None
    quantize(
        small_llama(tmp_path / "llama"),
        tmp_path / "out",
        Quantization(scheme=name),
        texts,
        tokens=1024,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    model(torch.arange(5)[None])  # the first call makes plain weights of what is stored
    layers = (one for one in model.model.layers.modules() if isinstance(one, torch.nn.Linear))
    layer = max(layers, key=_zero_point)
    random = torch.Generator().manual_seed(1)
    inputs_ni = torch.randn(7, layer.in_features, generator=random) * 2 + 0.7

    form = SCHEMES[name].activations
    assert form is not None
    grid = token_grid(inputs_ni, form)
    if not form.dynamic:
        zero = None if form.number == "float" else layer.input_zero_point.float()
        grid = InputGrid(layer.input_scale, zero)
        assert (zero is None) or (zero != 0).any()
    rounded_ni = grid.rounded(inputs_ni)

    assert not torch.equal(rounded_ni, inputs_ni)
    torch.testing.assert_close(layer(inputs_ni[None])[0], rounded_ni @ layer.weight.T)


def _zero_point(layer: torch.nn.Module) -> float:
    return float(getattr(layer, "input_zero_point", torch.zeros(1)).abs().max())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(1e-3, 1e3))
def test_a_token_is_no_farther_from_its_grid_than_half_a_step(
    seed: int, shift: float, size: float
) -> None:
    random = torch.Generator().manual_seed(seed)
    inputs_ni = (torch.randn(5, 64, generator=random) + shift) * size
    grid = token_grid(inputs_ni, INT8)
    least_n1 = inputs_ni.amin(1, keepdim=True).clamp(max=0)
    span_n1 = inputs_ni.amax(1, keepdim=True).clamp(min=0) - least_n1
    assert ((grid.rounded(inputs_ni) - inputs_ni).abs() <= span_n1 / 255 * 0.505).all()
    assert torch.equal(grid.rounded(torch.zeros(5, 64)), torch.zeros(5, 64))


def test_zeros_have_a_grid() -> None:
    for form in (INT8, FP8):
        grid = token_grid(torch.zeros(2, 8), form)
        assert torch.equal(grid.rounded(torch.zeros(2, 8)), torch.zeros(2, 8))
        fixed = input_grid(torch.zeros(1), torch.zeros(1), form, torch.bfloat16)
        assert float(fixed.scale) == 1.0
