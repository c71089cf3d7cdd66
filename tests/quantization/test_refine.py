"""Refined codes and scales are the best there are while the others stay."""

import pytest
import torch
from torch import Tensor

from llmscale.quantization.gptq import gptq, layer_error
from llmscale.quantization.grids import Grid, find_grid
from llmscale.quantization.refine import better_codes, better_scales, refined
from llmscale.quantization.schemes import WeightFormat

ROWS, COLUMNS, GROUP = 12, 96, 32


def layer(seed: int, symmetric: bool) -> tuple[Tensor, Tensor, Grid]:
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=random) / COLUMNS**0.5
    inputs = torch.randn(300, COLUMNS, generator=random) @ mixing + 0.2
    hessian = inputs.T @ inputs / len(inputs) + 0.01 * torch.eye(COLUMNS)
    weight = torch.randn(ROWS, COLUMNS, generator=random)
    form = WeightFormat(4, "group", symmetric=symmetric)
    return weight, hessian, find_grid(weight, form, GROUP, torch.bfloat16, hessian.diagonal())


def row_errors(grid: Grid, codes: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    difference = (grid.values(codes) - weight).double()
    return ((difference @ hessian.double()) * difference).sum(-1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_other_single_code_is_better(symmetric: bool) -> None:
    weight, hessian, grid = layer(1, symmetric)
    codes = grid.codes(weight)
    for _ in range(30):
        codes = better_codes(weight, hessian, grid, codes)
    least = row_errors(grid, codes, weight, hessian)
    for column in range(COLUMNS):
        for code in range(-8, 8):
            other = codes.clone()
            other[:, column] = code
            errors = row_errors(grid, other, weight, hessian)
            assert (errors >= least * (1 - 1e-5)).all(), (column, code)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_sweep_is_the_plain_loop_over_columns(symmetric: bool) -> None:
    weight, hessian, grid = layer(2, symmetric)
    codes = gptq(weight, hessian, grid)
    expected = codes.clone()
    for column in range(COLUMNS):
        tried = []
        for code in range(-8, 8):
            other = expected.clone()
            other[:, column] = code
            tried.append(row_errors(grid, other, weight, hessian))
        expected[:, column] = torch.stack(tried).argmin(0).float() - 8
    assert (better_codes(weight, hessian, grid, codes) == expected).float().mean() > 0.99


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_those_of_least_squares(symmetric: bool) -> None:
    weight, hessian, grid = layer(3, symmetric)
    codes = gptq(weight, hessian, grid)

    got = better_scales(weight, hessian, grid, codes, torch.float32)

    root = torch.linalg.cholesky(hessian.double()).T
    for row in range(ROWS):
        steps = (
            codes[row]
            if grid.zero_og is None
            else codes[row] - grid.zero_og[row].repeat_interleave(GROUP)
        )
        parts = torch.stack(
            [
                torch.where(torch.arange(COLUMNS) // GROUP == group, steps, 0.0).double()
                for group in range(COLUMNS // GROUP)
            ]
        )
        solution = torch.linalg.lstsq(root @ parts.T, root @ weight[row].double()[:, None]).solution
        assert torch.allclose(got.scale_og[row].double(), solution[:, 0], rtol=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_error_is_less_in_every_row_and_scales_are_as_stored(symmetric: bool) -> None:
    weight, hessian, grid = layer(4, symmetric)
    codes = gptq(weight, hessian, grid)

    better, own = refined(weight, hessian, grid, codes, torch.bfloat16)

    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(COLUMNS)
    before, after = (row_errors(g, c, weight, damped) for g, c in ((grid, codes), (own, better)))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.9 * before.sum()
    assert torch.equal(own.scale_og, own.scale_og.bfloat16().float())
    assert better.min() >= -8
    assert better.max() <= 7
    assert layer_error(own.values(better) - weight, damped) == pytest.approx(
        float(after.sum()), rel=1e-3
    )


def test_groups_of_zeros_and_dead_columns_stay() -> None:
    weight, hessian, _ = layer(5, True)
    weight[3] = 0
    weight[:, :GROUP] = 0
    hessian[7], hessian[:, 7] = 0, 0
    hessian[7, 7] = 0.01
    grid = find_grid(weight, WeightFormat(4, "group"), GROUP, torch.bfloat16, hessian.diagonal())
    better, own = refined(weight, hessian, grid, gptq(weight, hessian, grid), torch.bfloat16)
    got = own.values(better)
    assert torch.isfinite(got).all()
    assert (got[3] == 0).all()
