"""GPTQ: rounding a layer's weights one column after the other, the rest making up for each.

Frantar et al. 2022, algorithm 1, for the error sum over tokens of |W x - Q x|^2 = tr(D H D^T) with
D = W - Q and H = X^T X. Shape legend: o outputs (rows), i inputs (columns), g groups, b a block.
"""

import torch
from torch import Tensor

from llmscale.quantization.grids import Grid

COLUMNS_A_BLOCK = 64
DAMPING = 0.01
"""Of the mean of the diagonal, what is added to it."""

DAMPING_STEPS = 12

SHRINKAGE = 0.2
"""Of each column's own diagonal, what is added to it."""


class NotPositiveDefinite(ValueError):
    """No damping within reason makes a Hessian positive definite."""


def usable(hessian_ii: Tensor) -> Tensor:
    """The same with the least diagonal there is where a column's inputs are always zero."""
    hessian = hessian_ii.clone()
    dead = hessian.diagonal() <= 0
    live = hessian.diagonal()[~dead]
    hessian[dead] = 0
    hessian[:, dead] = 0
    hessian.diagonal()[dead] = live.min() if len(live) else 1
    return hessian


def shrunken(hessian_ii: Tensor) -> Tensor:
    """The same, nearer to its diagonal.

    Products of different columns over a calibration are partly chance, and corrections that rely
    on them do harm on other texts: they count less by a fixed part, as in the shrinkage of a
    covariance towards its diagonal (Schaefer and Strimmer 2005).
    """
    return hessian_ii + torch.diag(hessian_ii.diagonal() * SHRINKAGE)


def inverse_factor(hessian_ii: Tensor, damping: float = DAMPING) -> Tensor:
    """The upper triangle U with U^T U the inverse of the damped Hessian.

    It is the inverse of the triangle that the Cholesky factorization of the Hessian in reverse
    order gives, so that no full inverse is formed. Damping is raised until there is one.

    Raises:
        NotPositiveDefinite: if none is found.
    """
    mean = hessian_ii.diagonal().mean()
    identity = torch.eye(len(hessian_ii))
    for _ in range(DAMPING_STEPS):
        damped = hessian_ii + identity * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            upper = lower.flip(0, 1)
            return torch.linalg.solve_triangular(upper, identity, upper=True)
        damping *= 4
    raise NotPositiveDefinite


def gptq(weight_oi: Tensor, hessian_ii: Tensor, grid: Grid, damping: float = DAMPING) -> Tensor:
    """The codes [o, i] of weights, columns with the largest inputs first.

    The grid is that of the weights as they were, so that the order leaves no trace in the format
    (compressed-tensors' ``actorder: weight``). Within a block of columns corrections wait until
    a column is due, and behind it until the block is done.
    """
    order_i = torch.argsort(hessian_ii.diagonal(), descending=True, stable=True)
    upper_ii = inverse_factor(hessian_ii[order_i][:, order_i], damping)
    group_i = order_i // (weight_oi.shape[1] // grid.scale_og.shape[1])
    scale_io = grid.scale_og.T[group_i]
    zero_io = None if grid.zero_og is None else grid.zero_og.T[group_i]
    left_io = weight_oi.T[order_i].contiguous()
    codes_io = torch.empty_like(left_io)
    columns = len(order_i)
    for begin in range(0, columns, COLUMNS_A_BLOCK):
        end = min(begin + COLUMNS_A_BLOCK, columns)
        errors_bo = torch.empty(end - begin, len(weight_oi))
        for place, column in enumerate(range(begin, end)):
            due_o, code_o, scale_o = left_io[column], codes_io[column], scale_io[column]
            if place:
                due_o.addmv_(errors_bo[:place].T, upper_ii[begin:column, column], alpha=-1)
            torch.div(due_o, scale_o, out=code_o)
            if zero_io is not None:
                code_o += zero_io[column]
            code_o.round_().clamp_(grid.least, grid.most)
            steps_o = code_o if zero_io is None else code_o - zero_io[column]
            torch.addcmul(due_o, steps_o, scale_o, value=-1, out=errors_bo[place])
            errors_bo[place] /= upper_ii[column, column]
        left_io[end:].addmm_(upper_ii[begin:end, end:].T, errors_bo, alpha=-1)
    codes_oi = torch.empty_like(weight_oi)
    codes_oi[:, order_i] = codes_io.T
    return codes_oi


def layer_error(difference_oi: Tensor, hessian_ii: Tensor) -> float:
    """The squared error of a layer's outputs over the calibration: tr(D H D^T)."""
    return float(((difference_oi @ hessian_ii) * difference_oi).sum())
