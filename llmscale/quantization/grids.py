"""Grids: which numbers a weight may become, and rounding to them.

Shape legend: o outputs (rows), i inputs (columns), g groups of columns in a row, w columns in one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmscale.quantization.schemes import WeightFormat

E4M3 = torch.float8_e4m3fn
E4M3_MOST = 448.0
ROWS_AT_ONCE = 1024
SHRINKING: tuple[float, ...] = (1.0, 0.92, 0.84, 0.76, 0.68, 0.60)
"""The parts of a group's range that are tried as its grid's range."""
NUDGES: tuple[float, ...] = (0.96, 0.98, 1.02, 1.04)
"""What the best of them is multiplied by afterwards, to come nearer to the least error."""


@dataclass(frozen=True)
class Grid:
    """The numbers that weights [o, i] may become: (code - zero) * scale, the scale by group.

    A ``zero_og`` is an integer in the codes' range; symmetric grids have none.
    """

    format: WeightFormat
    scale_og: Tensor
    zero_og: Tensor | None = None

    @property
    def least(self) -> float:
        """The lowest code."""
        return lowest_code(self.format)

    @property
    def most(self) -> float:
        """The highest code."""
        return highest_code(self.format)

    def codes(self, weight_oi: Tensor) -> Tensor:
        """The nearest codes, as floats."""
        scaled = _grouped(weight_oi, self.scale_og) / self.scale_og[..., None]
        if self.zero_og is not None:
            scaled += self.zero_og[..., None]
        return _rounded(scaled, self.format).reshape(weight_oi.shape)

    def values(self, codes_oi: Tensor) -> Tensor:
        """The weights that codes stand for, in fp32."""
        codes = _grouped(codes_oi, self.scale_og)
        if self.zero_og is not None:
            codes = codes - self.zero_og[..., None]
        return (codes * self.scale_og[..., None]).reshape(codes_oi.shape)

    def rounded(self, weight_oi: Tensor) -> Tensor:
        """The nearest weights on the grid."""
        return self.values(self.codes(weight_oi))

    def rows(self, begin: int, end: int) -> "Grid":
        """The grid of some rows."""
        zero = None if self.zero_og is None else self.zero_og[begin:end]
        return Grid(self.format, self.scale_og[begin:end], zero)


def lowest_code(form: WeightFormat) -> float:
    """The least code of a format; of floats the least number."""
    return -E4M3_MOST if form.number == "float" else float(-(2 ** (form.bits - 1)))


def highest_code(form: WeightFormat) -> float:
    """The greatest code of a format; of floats the greatest number."""
    return E4M3_MOST if form.number == "float" else float(2 ** (form.bits - 1) - 1)


def find_grid(
    weight_oi: Tensor,
    form: WeightFormat,
    group_size: int | None,
    dtype: torch.dtype,
    importance_i: Tensor | None = None,
    quick: bool = False,
) -> Grid:
    """The grid of least error: among shrunken ranges the one whose squared error is least.

    Scales are numbers of ``dtype``, in which they are stored. A symmetric grid has one code more
    below zero than above, so both signs of its scale are tried: the longer side then lies where a
    row's group has its greatest weight.

    Args:
        importance_i: what a column's squared error counts, such as its inputs' mean square.
        quick: tries two ranges, to compare weights by, not to store them.
    """
    group_size = group_size or weight_oi.shape[1]
    if form.number == "float":
        largest_og = weight_oi.unflatten(1, (-1, group_size)).abs().amax(-1)
        return Grid(form, stored_scale(largest_og / E4M3_MOST, dtype))
    parts, nudges = SHRINKING, NUDGES
    if form.observer == "minmax":
        parts, nudges = (1.0,), ()
    elif quick:
        parts, nudges = (1.0, 0.9), ()
    if importance_i is None:
        importance_i = torch.ones(weight_oi.shape[1], device=weight_oi.device)
    importance_gw = importance_i.reshape(-1, group_size)
    found = []
    for rows_oi in weight_oi.split(ROWS_AT_ONCE):
        rows_gow = rows_oi.unflatten(1, (-1, group_size)).transpose(0, 1).contiguous()
        found.append(_Search(rows_gow, form, dtype, importance_gw).best(parts, nudges))
    scales, zeros = zip(*found, strict=True)
    return Grid(form, torch.cat(scales), None if form.symmetric else torch.cat(zeros))


class _Search:
    """The scales of least error for some rows; two buffers serve all that are tried."""

    def __init__(
        self, weight_gow: Tensor, form: WeightFormat, dtype: torch.dtype, importance_gw: Tensor
    ) -> None:
        self._weight_gow, self._form, self._dtype = weight_gow, form, dtype
        self._importance_gw1 = importance_gw[..., None]
        self._scaled_gow = torch.empty_like(weight_gow)
        self._wrong_gow = torch.empty_like(weight_gow)
        self._error_go = torch.full_like(weight_gow[..., 0], torch.inf)
        self._scale_go = torch.ones_like(self._error_go)
        self._zero_go = torch.zeros_like(self._error_go)
        if form.symmetric:
            self._whole_ranges_go = self._symmetric_ranges()
        else:
            whole_go, self._zero_go = self._range_and_zero()
            self._whole_ranges_go = [whole_go]

    def best(self, parts: Sequence[float], nudges: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Scales and zeros [o, g], of parts of the range, then of what lies around the best."""
        for whole_go in self._whole_ranges_go:
            for part in parts:
                self._try(whole_go * part)
        found_go = self._scale_go
        for nudge in nudges:
            self._try(found_go * nudge)
        return self._scale_go.T, self._zero_go.T

    def _symmetric_ranges(self) -> list[Tensor]:
        """Scales by which codes reach as far as the weights, of either sign where there are two."""
        form, (least_go, most_go) = self._form, self._weight_gow.aminmax(dim=-1)
        farthest_go = torch.maximum(most_go, -least_go)
        ranges = [farthest_go / ((highest_code(form) - lowest_code(form)) / 2)]
        if form.granularity == "group":
            sign_go = torch.where(most_go > -least_go, -1.0, 1.0)
            ranges.append(sign_go * farthest_go / -lowest_code(form))
        return ranges

    def _range_and_zero(self) -> tuple[Tensor, Tensor]:
        """The scale by which codes reach from the least weight to the greatest, and its zero."""
        form, (least_go, most_go) = self._form, self._weight_gow.aminmax(dim=-1)
        least_go, most_go = least_go.clamp(max=0), most_go.clamp(min=0)
        whole_go = (most_go - least_go) / (highest_code(form) - lowest_code(form))
        zero_go = lowest_code(form) - least_go / stored_scale(whole_go, torch.float32)
        return whole_go, zero_go.round_()

    def _try(self, scale_go: Tensor) -> None:
        """Keeps a scale where its error is the least so far."""
        scale_go = stored_scale(scale_go, self._dtype)
        scaled_gow, wrong_gow = self._scaled_gow, self._wrong_gow
        torch.div(self._weight_gow, scale_go[..., None], out=scaled_gow)
        if not self._form.symmetric:
            scaled_gow += self._zero_go[..., None]
        torch.round(scaled_gow, out=wrong_gow)
        wrong_gow.clamp_(lowest_code(self._form), highest_code(self._form))
        wrong_gow.sub_(scaled_gow).square_()
        error_go = (wrong_gow @ self._importance_gw1)[..., 0].mul_(scale_go.square())
        better_go = error_go < self._error_go
        self._error_go = torch.where(better_go, error_go, self._error_go)
        self._scale_go = torch.where(better_go, scale_go, self._scale_go)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as its folder holds it; where all is zero it is any."""
    stored = scale.to(dtype).float()
    return torch.where(stored == 0, torch.ones_like(stored), stored)


def _rounded(scaled: Tensor, form: WeightFormat) -> Tensor:
    if form.number == "float":
        return scaled.clamp(lowest_code(form), highest_code(form)).to(E4M3).float()
    return scaled.round().clamp_(lowest_code(form), highest_code(form))


def _grouped(tensor_oi: Tensor, scale_og: Tensor) -> Tensor:
    return tensor_oi.unflatten(1, (scale_og.shape[1], -1))
