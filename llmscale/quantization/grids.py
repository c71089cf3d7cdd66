"""Grids: which numbers a weight may become, and rounding to them.

Shape legend: o outputs (rows), i inputs (columns), g groups of columns in a row, w columns in one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmscale.quantization.schemes import WeightFormat

E4M3 = torch.float8_e4m3fn
ROWS_AT_ONCE = 256
SHRINKING = tuple(1 - step / 40 for step in range(17))
"""The parts of a group's range that are tried as its grid's range."""


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
    return -448.0 if form.number == "float" else float(-(2 ** (form.bits - 1)))


def highest_code(form: WeightFormat) -> float:
    """The greatest code of a format; of floats the greatest number."""
    return 448.0 if form.number == "float" else float(2 ** (form.bits - 1) - 1)


def find_grid(
    weight_oi: Tensor,
    form: WeightFormat,
    group_size: int | None,
    dtype: torch.dtype,
    importance_i: Tensor | None = None,
    shrinking: Sequence[float] = SHRINKING,
) -> Grid:
    """The grid of least error: among shrunken ranges the one whose squared error is least.

    Scales are numbers of ``dtype``, in which they are stored. A symmetric grid has one code more
    below zero than above, so both signs of its scale are tried: the longer side then lies where a
    row's group has its greatest weight.

    Args:
        importance_i: what a column's squared error counts, such as its inputs' mean square.
        shrinking: the parts of the range that are tried; with the format's observer ``minmax``
            it is the whole.
    """
    if form.observer == "minmax":
        shrinking = (1.0,)
    group_size = group_size or weight_oi.shape[1]
    if importance_i is None:
        importance_i = torch.ones(weight_oi.shape[1], device=weight_oi.device)
    importance_gw = importance_i.reshape(-1, group_size)
    parts = [
        _grid_of_rows(rows.unflatten(1, (-1, group_size)), form, dtype, importance_gw, shrinking)
        for rows in weight_oi.split(ROWS_AT_ONCE)
    ]
    zeros = [zero for _, zero in parts if zero is not None]
    return Grid(form, torch.cat([scale for scale, _ in parts]), torch.cat(zeros) if zeros else None)


def _grid_of_rows(
    weight_ogw: Tensor,
    form: WeightFormat,
    dtype: torch.dtype,
    importance_gw: Tensor,
    shrinking: Sequence[float],
) -> tuple[Tensor, Tensor | None]:
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for scale_og, zero_og in _candidates(weight_ogw, form, shrinking):
        scale_og = _stored(scale_og, dtype)
        scaled = weight_ogw / scale_og[..., None]
        if not form.symmetric:
            scaled += zero_og[..., None]
        wrong = (_rounded(scaled, form).sub_(scaled)).mul_(scale_og[..., None]).square_()
        error_og = wrong.mul_(importance_gw).sum(-1)
        if best is None:
            best = error_og, scale_og, zero_og
        else:
            better = error_og < best[0]
            best = (
                torch.where(better, error_og, best[0]),
                torch.where(better, scale_og, best[1]),
                torch.where(better, zero_og, best[2]),
            )
    assert best is not None
    return best[1], None if form.symmetric else best[2]


def _candidates(
    weight_ogw: Tensor, form: WeightFormat, shrinking: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    least, most = weight_ogw.amin(-1), weight_ogw.amax(-1)
    if form.number == "float":
        yield torch.maximum(most, -least) / highest_code(form), torch.zeros_like(most)
        return
    levels = highest_code(form) - lowest_code(form)
    if form.symmetric:
        farthest = torch.maximum(most, -least)
        sign = torch.where(most > -least, -1.0, 1.0)
        for part in shrinking:
            yield farthest * part / (levels / 2), torch.zeros_like(most)
            if form.granularity == "group":
                yield sign * farthest * part / -lowest_code(form), torch.zeros_like(most)
        return
    least, most = least.clamp(max=0), most.clamp(min=0)
    for part in shrinking:
        scale = (most - least) * part / levels
        yield scale, (lowest_code(form) - least * part / _stored(scale, torch.float32)).round_()


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as its folder holds it; a group of zeros gets any."""
    stored = scale.to(dtype).float()
    return torch.where(stored == 0, torch.ones_like(stored), stored)


def _rounded(scaled: Tensor, form: WeightFormat) -> Tensor:
    if form.number == "float":
        return scaled.clamp(lowest_code(form), highest_code(form)).to(E4M3).float()
    return scaled.round().clamp_(lowest_code(form), highest_code(form))


def _grouped(tensor_oi: Tensor, scale_og: Tensor) -> Tensor:
    return tensor_oi.unflatten(1, (scale_og.shape[1], -1))
