"""Scales by which a layer's inputs are divided and its weights' columns multiplied.

The product stays the same, and what is rounded changes: AWQ (Lin et al. 2023) keeps the columns
with large inputs more exact, SmoothQuant (Xiao et al. 2022, equation 4) takes outliers out of the
inputs. Shape legend: o outputs (rows), i inputs (columns), n tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmscale.quantization.gptq import layer_error
from llmscale.quantization.grids import find_grid
from llmscale.quantization.inputs import InputStatistics

if TYPE_CHECKING:
    from llmscale.quantization.layers import Recipe

EXPONENTS = tuple(step / 10 for step in range(10))
SMOOTHING_EXPONENTS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Closer where the best ones are: a step too far spoils an input, or a weight, in 8 bits."""
ROWS_TRIED = 512


def find_scales(
    weight_oi: Tensor,
    recipe: "Recipe",
    statistics: InputStatistics,
    hessian_ii: Tensor | None,
    shares_i: Tensor,
) -> Tensor:
    """The scales whose exponent gives the least error of the layer's outputs.

    For AWQ they are a power of the inputs' root mean square, alone or over one of the weights', and
    the error follows from the Hessian; for SmoothQuant a power of the greatest input over one of
    the greatest weight, and the error is that of rounded inputs and weights over some tokens of
    the calibration.

    Args:
        hessian_ii: of AWQ; None is SmoothQuant.
        shares_i: columns with the same number are one output of what comes before, and have one
            scale.
    """
    some_oi = weight_oi[:: max(1, len(weight_oi) // ROWS_TRIED)]
    best, least = torch.ones(weight_oi.shape[1]), float("inf")
    if hessian_ii is not None:
        inputs_i, weights_i = hessian_ii.diagonal().sqrt(), weight_oi.square().mean(0).sqrt()
        exponents = [*((up, 0.0) for up in EXPONENTS), *((up, 1 - up) for up in EXPONENTS)]
        error_of: Callable[[Tensor], float] = partial(_weight_error, some_oi, recipe, hessian_ii)
    else:
        inputs_i, weights_i = statistics.largest_i, weight_oi.abs().amax(0)
        exponents = [(0.0, 0.0), *((up, 1 - up) for up in SMOOTHING_EXPONENTS)]
        error_of = _rounding_error(some_oi, recipe, statistics)
    for up, down in exponents:
        scales_i = inputs_i.clamp(min=1e-5) ** up / weights_i.clamp(min=1e-5) ** down
        scales_i = _shared(scales_i, shares_i)
        scales_i = scales_i / (scales_i.max() * scales_i.min()).sqrt()
        error = error_of(scales_i)
        if error < least:
            best, least = scales_i, error
    return best


def _shared(scales_i: Tensor, shares_i: Tensor) -> Tensor:
    """The geometric mean over the columns that are the same output of what comes before."""
    outputs = int(shares_i.max()) + 1
    sums = torch.zeros(outputs).index_add_(0, shares_i, scales_i.log())
    counts = torch.zeros(outputs).index_add_(0, shares_i, torch.ones_like(scales_i))
    return (sums / counts).exp()[shares_i]


def _weight_error(weight_oi: Tensor, recipe: "Recipe", hessian: Tensor, scales_i: Tensor) -> float:
    scaled_oi = weight_oi * scales_i
    importance_i = hessian.diagonal() / scales_i.square()
    difference_oi = _nearest(scaled_oi, recipe, importance_i) / scales_i - weight_oi
    return layer_error(difference_oi, hessian)


def _rounding_error(
    weight_oi: Tensor, recipe: "Recipe", statistics: InputStatistics
) -> Callable[[Tensor], float]:
    """Gives the squared error of outputs by scales, with inputs and weights rounded."""
    form = recipe.scheme.activations
    assert form is not None
    wanted_no = statistics.samples_ni @ weight_oi.T

    def error(scales_i: Tensor) -> float:
        rounded_ni = statistics.rounded_samples(form, recipe.dtype, scales_i)
        got_no = rounded_ni @ _nearest(weight_oi * scales_i, recipe).T
        return float((got_no - wanted_no).square().sum())

    return error


def _nearest(weight_oi: Tensor, recipe: "Recipe", importance_i: Tensor | None = None) -> Tensor:
    form = recipe.scheme.weights
    grid = find_grid(weight_oi, form, recipe.group_size, recipe.dtype, importance_i, quick=True)
    return grid.rounded(weight_oi)
