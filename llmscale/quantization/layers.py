"""Quantizing the linear layers that share an input.

Shape legend: o outputs (rows), i inputs (columns).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmscale.quantization.activations import InputGrid, input_grid
from llmscale.quantization.gptq import gptq, shrunken, usable
from llmscale.quantization.grids import Grid, find_grid
from llmscale.quantization.inputs import InputStatistics
from llmscale.quantization.refine import refined
from llmscale.quantization.scaling import find_scales
from llmscale.quantization.schemes import Scheme


@dataclass(frozen=True)
class Recipe:
    """How layers are quantized: the scheme, and what it leaves open.

    ``bits`` is what a weight takes on average where layers differ, ``wide`` the names of those in
    the scheme's wider format.
    """

    scheme: Scheme
    group_size: int | None
    dtype: torch.dtype
    bits: float | None = None
    wide: frozenset[str] = frozenset()

    def of(self, name: str) -> "Recipe":
        """That of one layer."""
        if name not in self.wide:
            return self
        assert self.scheme.wider is not None
        scheme = replace(self.scheme, weights=self.scheme.wider)
        return replace(self, scheme=scheme, group_size=None, wide=frozenset())

    def within(self, prefix: str) -> "Recipe":
        """The same for layers by their names behind a prefix."""
        names = (name for name in self.wide if name.startswith(prefix))
        return replace(self, wide=frozenset(name.removeprefix(prefix) for name in names))


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer's codes [o, i] on its grid, and the grid of its inputs where that is fixed."""

    codes_oi: Tensor
    grid: Grid
    inputs: InputGrid | None = None

    @property
    def weight_oi(self) -> Tensor:
        """The weights that it stands for, in fp32."""
        return self.grid.values(self.codes_oi)


@dataclass(frozen=True)
class QuantizedGroup:
    """Layers that share an input, and what that is divided by, a number a column."""

    layers: Mapping[str, QuantizedLayer]
    scales_i: Tensor | None = None

    def effective(self, name: str) -> Tensor:
        """The weights by which inputs that are not divided are multiplied."""
        weight_oi = self.layers[name].weight_oi
        return weight_oi if self.scales_i is None else weight_oi / self.scales_i


def quantize_layers(
    weights: Mapping[str, Tensor],
    recipe: Recipe,
    statistics: InputStatistics | None = None,
    shares_i: Tensor | None = None,
) -> QuantizedGroup:
    """Quantizes the weights [o, i] of layers with one input.

    Args:
        statistics: of that input, for schemes that are calibrated.
        shares_i: where scales may be moved to what comes before: the number of the output of that
            which each column is.
    """
    scheme = recipe.scheme
    weight_oi = torch.cat(list(weights.values()))
    hessian_ii = None
    if statistics is not None and scheme.by_products:
        hessian_ii = shrunken(usable(statistics.hessian_ii / statistics.tokens))
    scales_i = None
    if scheme.scaling is not None and shares_i is not None:
        assert statistics is not None
        products_ii = hessian_ii if scheme.scaling == "awq" else None
        scales_i = find_scales(weight_oi, recipe, statistics, products_ii, shares_i)
        weight_oi = weight_oi * scales_i
        if hessian_ii is not None:
            hessian_ii = hessian_ii / scales_i / scales_i[:, None]
    importance_i = None if hessian_ii is None else hessian_ii.diagonal()
    grid = find_grid(weight_oi, scheme.weights, recipe.group_size, recipe.dtype, importance_i)
    if scheme.rounding == "gptq":
        assert hessian_ii is not None, "GPTQ needs the inputs' products"
        codes_oi = gptq(weight_oi, hessian_ii, grid)
        if scheme.refined:
            codes_oi, grid = refined(weight_oi, hessian_ii, grid, codes_oi, recipe.dtype)
    else:
        codes_oi = grid.codes(weight_oi)
    inputs = _fixed_grid(recipe, statistics, scales_i)
    layers, begin = {}, 0
    for name, own in weights.items():
        end = begin + len(own)
        layers[name] = QuantizedLayer(codes_oi[begin:end], grid.rows(begin, end), inputs)
        begin = end
    return QuantizedGroup(layers, scales_i)


def _fixed_grid(
    recipe: Recipe, statistics: InputStatistics | None, scales_i: Tensor | None
) -> InputGrid | None:
    """That of all inputs of the calibration, divided by their scales; None where it is dynamic."""
    form = recipe.scheme.activations
    if form is None or form.dynamic:
        return None
    assert statistics is not None, "static scales come from a calibration"
    ends = (statistics.least_i, statistics.most_i)
    least_i, most_i = ends if scales_i is None else (end_i / scales_i for end_i in ends)
    return input_grid(least_i.min().reshape(1), most_i.max().reshape(1), form, recipe.dtype)
