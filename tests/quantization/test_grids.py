"""Grids hold the weights they are for, at a scale that is stored as it is used."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.errors import RecipeError
from llmscale.quantization.grids import find_grid
from llmscale.quantization.schemes import WeightFormat, fitting_group_size

FORMATS = [
    WeightFormat(4, "group"),
    WeightFormat(4, "group", symmetric=False),
    WeightFormat(8, "channel"),
    WeightFormat(8, "channel", "float"),
]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(FORMATS), st.floats(1e-6, 1e4), st.floats(-2, 2))
def test_rounding_is_idempotent_and_no_farther_than_half_a_step_of_the_whole_range(
    seed: int, form: WeightFormat, size: float, shift: float
) -> None:
    random = torch.Generator().manual_seed(seed)
    weight = (torch.randn(6, 64, generator=random) + shift) * size
    width = 32 if form.granularity == "group" else 64

    grid = find_grid(weight, form, None if width == 64 else width, torch.bfloat16)

    rounded = grid.rounded(weight)
    assert torch.equal(grid.rounded(rounded), rounded)
    assert torch.equal(grid.scale_og.bfloat16().float(), grid.scale_og)
    groups, kept = weight.unflatten(1, (-1, width)), rounded.unflatten(1, (-1, width))
    span = groups.abs().amax(-1) * 2 if form.symmetric else groups.amax(-1) - groups.amin(-1)
    step = span / (2**form.bits - 1)
    if form.number == "int":
        # The error of the whole group, not of each weight: the range is shrunken where that helps.
        wrong = (groups - kept).square().mean(-1).sqrt()
        assert (wrong <= step * 0.75 + span * 0.01).all()
    else:
        assert ((groups - kept).abs() <= groups.abs() * 2**-3.5 + span / 448 / 8).all()


def test_by_minmax_a_range_reaches_as_far_as_its_weights() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    weight[:, 3] = 9.0  # far from all others, so that the least squared error has a shorter range
    weight[:, 40] = -9.5
    largest_o1 = weight.abs().amax(1, keepdim=True)

    rows = find_grid(weight, WeightFormat(8, "channel", observer="minmax"), None, torch.bfloat16)
    assert torch.equal(rows.scale_og, (largest_o1 / 127.5).bfloat16().float())

    largest_og = weight.unflatten(1, (-1, 32)).abs().amax(-1)
    scales = find_grid(weight, WeightFormat(4, "group", observer="minmax"), 32, torch.bfloat16)
    ends = [(largest_og / part).bfloat16().float() for part in (7.5, 8.0)]
    found = scales.scale_og.abs()
    assert ((found == ends[0]) | (found == ends[1])).all()
    searched = find_grid(weight, WeightFormat(4, "group"), 32, torch.bfloat16).scale_og.abs()
    assert (searched < found).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_weights_are_not_taken_for_zeros(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)) * 1e-3
    rounded = find_grid(weight, WeightFormat(8, "channel"), None, dtype).rounded(weight)
    assert (rounded - weight).norm() < 0.1 * weight.norm()


def test_groups_of_zeros_stay_zeros() -> None:
    weight = torch.zeros(4, 64)
    for form in FORMATS:
        assert torch.equal(find_grid(weight, form, None, torch.bfloat16).rounded(weight), weight)


def test_the_largest_group_that_divides_is_taken_and_said() -> None:
    assert fitting_group_size(None, [256, 1024]) == (128, "")
    size, why = fitting_group_size(None, [576, 1536])
    assert size == 64
    assert why == "group size 64: 128 does not divide 576 inputs of a layer"
    assert fitting_group_size(16, [48])[0] == 16
    with pytest.raises(
        RecipeError, match="does not divide 48 inputs of a layer; use 12, 16, 24 or 48"
    ):
        fitting_group_size(None, [48, 96])
    with pytest.raises(RecipeError, match="group_size: 100 does not divide 576"):
        fitting_group_size(100, [576])
