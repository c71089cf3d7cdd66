"""Quantizing the linear layers that share an input.

Shape legend: o outputs (rows), i inputs (columns).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmscale.quantization.activations import InputGrid
from llmscale.quantization.gptq import gptq, shrunken, usable
from llmscale.quantization.grids import Grid, find_grid
from llmscale.quantization.inputs import InputStatistics
from llmscale.quantization.refine import refined
from llmscale.quantization.scaling import find_scales
from llmscale.quantization.schemes import Layout, Scheme

LARGEST_NOISE = 1e-3
"""What rounding the inputs of layers that share them may add to their outputs, together, of the
mean square of these: 30 dB."""


@dataclass(frozen=True)
class Recipe:
    """How layers are quantized: the scheme, and what it leaves open.

    ``bits`` is what a weight takes on average where layers differ, ``wide`` the names of those in
    the scheme's wider format. ``by_token`` names those whose inputs one scale does not serve.
    """

    scheme: Scheme
    group_size: int | None
    dtype: torch.dtype
    bits: float | None = None
    wide: frozenset[str] = frozenset()
    by_token: frozenset[str] = frozenset()
    layout: Layout = "compressed-tensors"

    def of(self, name: str) -> "Recipe":
        """That of one layer."""
        if name in self.by_token:
            return self.dynamic
        if name not in self.wide:
            return self
        assert self.scheme.wider is not None
        scheme = replace(self.scheme, weights=self.scheme.wider)
        return replace(self, scheme=scheme, group_size=None, wide=frozenset())

    @property
    def dynamic(self) -> "Recipe":
        """The same with a scale a token for inputs."""
        assert self.scheme.activations is not None
        activations = replace(self.scheme.activations, dynamic=True)
        scheme = replace(self.scheme, activations=activations)
        return replace(self, scheme=scheme, by_token=frozenset())

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
    inputs = None
    if scheme.activations is not None and scheme.fixed_inputs:
        assert statistics is not None, "static scales come from a calibration"
        # What rounding to floats adds does not depend on their scale.
        by_scale = scheme.activations.number == "int"
        if by_scale and _noise(weight_oi, recipe, statistics, scales_i) > LARGEST_NOISE:
            return quantize_layers(weights, recipe.dynamic, statistics, shares_i)
        inputs = statistics.fixed_grid(scheme.activations, recipe.dtype, scales_i)
    importance_i = None if hessian_ii is None else hessian_ii.diagonal()
    grid = find_grid(weight_oi, scheme.weights, recipe.group_size, recipe.dtype, importance_i)
    if scheme.rounding == "gptq":
        assert hessian_ii is not None, "GPTQ needs the inputs' products"
        codes_oi = gptq(weight_oi, hessian_ii, grid)
        if scheme.refined:
            codes_oi, grid = refined(weight_oi, hessian_ii, grid, codes_oi, recipe.dtype)
    else:
        codes_oi = grid.codes(weight_oi)
    layers, begin = {}, 0
    for name, own in weights.items():
        end = begin + len(own)
        layers[name] = QuantizedLayer(codes_oi[begin:end], grid.rows(begin, end), inputs)
        begin = end
    return QuantizedGroup(layers, scales_i)


def _noise(
    weight_oi: Tensor, recipe: Recipe, statistics: InputStatistics, scales_i: Tensor | None
) -> float:
    """What rounding the inputs by one scale adds to outputs, of their mean square.

    Args:
        weight_oi: multiplied by the scales that inputs are divided by.
    """
    form = recipe.scheme.activations
    assert form is not None
    samples_ni = statistics.samples_ni
    if scales_i is not None:
        samples_ni = samples_ni / scales_i
    wrong_ni = statistics.rounded_samples(form, recipe.dtype, scales_i) - samples_ni
    added, wanted = ((one_ni @ weight_oi.T).square().sum() for one_ni in (wrong_ni, samples_ni))
    return float(added / wanted.clamp(min=torch.finfo().tiny))
