"""Making up for what rounding one column after the other leaves: codes and scales in turn.

The error is that of GPTQ, tr(D H D^T) with D = Q - W. Each code in turn becomes the best one while
all others stay (QuantEase, Behdin et al. 2023, equation 8); the scales of a row become those of
least error while its codes stay. No step makes a row's error greater.

Shape legend: o outputs (rows), i inputs (columns), g groups of columns in a row, b a block.
"""

from dataclasses import replace

import torch
from torch import Tensor

from llmscale.quantization.gptq import COLUMNS_A_BLOCK, DAMPING
from llmscale.quantization.grids import Grid

SWEEPS = 2
RIDGE = 1e-6
"""Of its mean diagonal, what is added to a row's equations for its scales."""


def refined(
    weight_oi: Tensor, hessian_ii: Tensor, grid: Grid, codes_oi: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Grid]:
    """Codes and a grid of less error by the damped Hessian; scales are numbers of ``dtype``."""
    hessian_ii = hessian_ii + torch.eye(len(hessian_ii)) * DAMPING * hessian_ii.diagonal().mean()
    for _ in range(SWEEPS):
        grid = better_scales(weight_oi, hessian_ii, grid, codes_oi, dtype)
        codes_oi = better_codes(weight_oi, hessian_ii, grid, codes_oi)
    return codes_oi, grid


def better_codes(weight_oi: Tensor, hessian_ii: Tensor, grid: Grid, codes_oi: Tensor) -> Tensor:
    """Each column's codes in turn the best ones, while all others are as they are by then.

    Within a block of columns the changes of those before reach a column when it is due, and behind
    the block when that is done.
    """
    columns = len(hessian_ii)
    width = columns // grid.scale_og.shape[1]
    scale_io = grid.scale_og.T.repeat_interleave(width, 0)
    zero_io = None if grid.zero_og is None else grid.zero_og.T.repeat_interleave(width, 0)
    codes_io = codes_oi.T.contiguous()
    value_io = grid.values(codes_oi).T.contiguous()
    pull_io = hessian_ii @ (value_io - weight_oi.T)
    for begin in range(0, columns, COLUMNS_A_BLOCK):
        end = min(begin + COLUMNS_A_BLOCK, columns)
        change_bo = torch.empty(end - begin, len(weight_oi))
        for place, column in enumerate(range(begin, end)):
            pull_o = pull_io[column]
            if place:
                pull_o = pull_o + hessian_ii[column, begin:column] @ change_bo[:place]
            code_o = (value_io[column] - pull_o / hessian_ii[column, column]) / scale_io[column]
            if zero_io is not None:
                code_o += zero_io[column]
            code_o.round_().clamp_(grid.least, grid.most)
            codes_io[column] = code_o
            value_o = (code_o if zero_io is None else code_o - zero_io[column]) * scale_io[column]
            change_bo[place] = value_o - value_io[column]
        pull_io[end:].addmm_(hessian_ii[end:, begin:end], change_bo)
    return codes_io.T.contiguous()


def better_scales(
    weight_oi: Tensor, hessian_ii: Tensor, grid: Grid, codes_oi: Tensor, dtype: torch.dtype
) -> Grid:
    """The grid with each row's scales of least error for its codes, where stored ones have less."""
    ones = replace(grid, scale_og=torch.ones_like(grid.scale_og))
    offset_oi = ones.values(codes_oi)
    groups = grid.scale_og.shape[1]
    width = len(hessian_ii) // groups
    left_ogg = torch.empty(len(weight_oi), groups, groups)
    right_og = torch.empty(len(weight_oi), groups)
    for group in range(groups):
        own = slice(group * width, (group + 1) * width)
        weighed_oi = offset_oi[:, own] @ hessian_ii[own]
        left_ogg[:, group] = (weighed_oi * offset_oi).unflatten(1, (groups, width)).sum(-1)
        right_og[:, group] = (weighed_oi * weight_oi).sum(-1)
    mean_o = left_ogg.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=torch.finfo().tiny)
    left_ogg += RIDGE * mean_o[:, None, None] * torch.eye(groups)
    solved_og = torch.linalg.solve_ex(left_ogg, right_og[..., None])[0][..., 0].to(dtype).float()
    usable_og = solved_og.isfinite() & (solved_og != 0)
    other = replace(grid, scale_og=torch.where(usable_og, solved_og, grid.scale_og))
    better_o = _errors(other.values(codes_oi) - weight_oi, hessian_ii) < _errors(
        grid.values(codes_oi) - weight_oi, hessian_ii
    )
    return replace(grid, scale_og=torch.where(better_o[:, None], other.scale_og, grid.scale_og))


def _errors(difference_oi: Tensor, hessian_ii: Tensor) -> Tensor:
    """By row."""
    return ((difference_oi @ hessian_ii) * difference_oi).sum(-1)
