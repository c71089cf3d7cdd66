"""GPTQ's codes are those of its definition, and hard inputs do no harm."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmscale.parallel import probes
from llmscale.quantization.gptq import (
    NotPositiveDefinite,
    gptq,
    inverse_factor,
    layer_error,
    shrunken,
    usable,
)
from llmscale.quantization.grids import Grid, find_grid
from llmscale.quantization.inputs import InputStatistics
from llmscale.quantization.schemes import WeightFormat

INT4 = WeightFormat(4, "group")


def layer(seed: int, rows: int = 24, columns: int = 160) -> tuple[Tensor, Tensor]:
    """Weights, and correlated inputs of uneven columns."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=random) / columns**0.5
    sizes = torch.rand(columns, generator=random) * 3 + 0.1
    inputs = torch.randn(400, columns, generator=random) @ mixing * sizes + 0.2
    return torch.randn(rows, columns, generator=random), inputs


def plain_gptq(weight: Tensor, hessian: Tensor, grid: Grid, damping: float) -> Tensor:
    """A loop over columns in fp64: after each, the best correction of all that are left.

    The correction is Optimal Brain Surgeon's, from the inverse of what is left of the Hessian,
    which is inverted anew for every column.
    """
    columns = len(hessian)
    damped = (hessian + torch.eye(columns) * damping * hessian.diagonal().mean()).double()
    left, codes = weight.double().clone(), torch.zeros_like(weight)
    waiting = sorted(range(columns), key=lambda column: -float(hessian[column, column]))
    width = columns // grid.scale_og.shape[1]
    while waiting:
        column = waiting[0]
        inverse = torch.linalg.inv(damped[waiting][:, waiting])
        scale = grid.scale_og[:, column // width].double()
        zero = 0 if grid.zero_og is None else grid.zero_og[:, column // width].double()
        code = (left[:, column] / scale + zero).round().clamp(grid.least, grid.most)
        codes[:, column] = code.float()
        error = (left[:, column] - (code - zero) * scale) / inverse[0, 0]
        left[:, waiting] -= error[:, None] * inverse[0]
        waiting = waiting[1:]
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_codes_are_those_of_a_plain_loop_over_columns(symmetric: bool) -> None:
    weight, inputs = layer(1)
    hessian = inputs.T @ inputs / len(inputs)
    form = WeightFormat(4, "group", symmetric=symmetric)
    grid = find_grid(weight, form, 32, torch.float32, hessian.diagonal())

    codes = gptq(weight, hessian, grid, 0.01)

    expected = plain_gptq(weight, hessian, grid, 0.01)
    # A number in the middle between two codes may go either way, and the row then goes its own.
    same_rows = (codes == expected).all(dim=1)
    assert same_rows.float().mean() > 0.9
    errors = [layer_error(grid.values(c) - weight, hessian) for c in (codes, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([16, 32, 160]))
def test_the_error_is_below_that_of_rounding_to_nearest(seed: int, group_size: int) -> None:
    weight, inputs = layer(seed)
    hessian = inputs.T @ inputs / len(inputs)
    grid = find_grid(weight, INT4, group_size, torch.bfloat16, hessian.diagonal())

    codes = gptq(weight, hessian, grid)

    assert codes.min() >= -8
    assert codes.max() <= 7
    assert torch.equal(codes, codes.round())
    rounded, corrected = (grid.values(c) - weight for c in (grid.codes(weight), codes))
    assert layer_error(corrected, hessian) < layer_error(rounded, hessian)


@pytest.mark.parametrize(("in_bf16", "apart"), [(False, 1e-5), (True, 2**-7)])
def test_the_products_are_those_of_all_tokens(
    in_bf16: bool, apart: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "quick_bf16", lambda: in_bf16)
    _, inputs = layer(2)
    statistics = InputStatistics(160, with_products=True, with_range=True)
    for part in inputs.split(64):
        statistics.add(part[None])

    assert statistics.tokens == 400
    size = inputs.square().sum(0).sqrt()
    wrong = statistics.hessian_ii - inputs.T @ inputs
    assert (wrong.abs() <= size * size[:, None] * apart).all()
    assert torch.equal(statistics.hessian_ii, statistics.hessian_ii.T)
    assert torch.equal(statistics.largest_i, inputs.abs().amax(0))


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    _, inputs = layer(3)
    hessian = inputs.T @ inputs / len(inputs)
    upper = inverse_factor(hessian, 0.01)

    damped = hessian + torch.eye(160) * 0.01 * hessian.diagonal().mean()
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(160), atol=1e-3)


def test_constant_inputs_and_a_dead_channel_are_quantized() -> None:
    weight, inputs = layer(4)
    inputs[:] = inputs[0]
    inputs[:, 7] = 0
    hessian = usable(inputs.T @ inputs / len(inputs))
    assert float(hessian[7, 7]) == float(hessian.diagonal().min()) > 0
    assert torch.equal(usable(torch.zeros(3, 3)), torch.eye(3))

    grid = find_grid(weight, INT4, 32, torch.bfloat16, hessian.diagonal())
    codes = gptq(weight, hessian, grid)

    got, expected = grid.values(codes) @ inputs[0], weight @ inputs[0]
    nearest = grid.rounded(weight) @ inputs[0]
    assert torch.isfinite(codes).all()
    assert (got - expected).norm() < 0.3 * (nearest - expected).norm()


def test_chance_products_of_few_tokens_do_less_harm_on_others() -> None:
    """Calibrated on hardly more tokens than columns, measured on the inputs' true products."""
    random = torch.Generator().manual_seed(6)
    mixing = torch.randn(160, 160, generator=random) / 160**0.5 + 0.7 * torch.eye(160)
    true = mixing.T @ mixing
    inputs = torch.randn(240, 160, generator=random) @ mixing
    weight = torch.randn(24, 160, generator=random)
    hessian = inputs.T @ inputs / len(inputs)
    grid = find_grid(weight, INT4, 32, torch.bfloat16, hessian.diagonal())

    plain, shrunk = (gptq(weight, own, grid) for own in (hessian, shrunken(hessian)))

    errors = [layer_error(grid.values(codes) - weight, true) for codes in (plain, shrunk)]
    assert errors[1] < 0.97 * errors[0]
    assert torch.equal(shrunken(hessian).tril(-1), hessian.tril(-1))
    assert torch.allclose(shrunken(hessian).diagonal(), 1.2 * hessian.diagonal())


def test_damping_is_raised_until_a_hessian_is_positive_definite() -> None:
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 1.5
    upper = inverse_factor(hessian)
    assert torch.isfinite(upper).all()
    with pytest.raises(NotPositiveDefinite):
        inverse_factor(torch.full((8, 8), float("nan")))
