"""Cross entropy over a vocabulary split by columns, in few passes over the logits.

Shape legend: n tokens, v this rank's columns of the vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ROWS, LOGITS = 64, 2**18
"""Tokens handled at a time, and more where they have fewer logits in all: these stay in a core's
cache between the passes."""


class _CrossEntropy(torch.autograd.Function):
    """``log sum exp(logits) - logits[label]`` a token; overwrites the logits it is given.

    Columns from ``true`` on are padding: they have no probability, and no gradient. Nor are they
    filled with a large negative number, as exponentials that underflow take seven times as long.
    """

    @staticmethod
    def forward(
        context: Any, logits_nv: Tensor, labels_n: Tensor, first: int, true: int, group: Any
    ) -> Tensor:
        target_n1 = (labels_n - first).unsqueeze(1)
        elsewhere_n1 = (target_n1 < 0) | (target_n1 >= logits_nv.shape[1])
        target_n1 = target_n1.masked_fill(elsewhere_n1, 0)
        logits_nv[:, true:] = 0.0
        largest_n1 = _largest(logits_nv[:, :true])
        if group.size() > 1:
            dist.all_reduce(largest_n1, op=dist.ReduceOp.MAX, group=group)
        chosen_n1, total_n1 = torch.empty_like(largest_n1), torch.empty_like(largest_n1)
        for rows in _rows(logits_nv):
            part = logits_nv[rows, :true].sub_(largest_n1[rows])
            torch.gather(logits_nv[rows], 1, target_n1[rows], out=chosen_n1[rows])
            torch.sum(part.exp_(), 1, keepdim=True, out=total_n1[rows])
        chosen_n1.masked_fill_(elsewhere_n1, 0.0)
        if group.size() > 1:
            dist.all_reduce(chosen_n1, group=group)
            dist.all_reduce(total_n1, group=group)
        context.true = true
        context.save_for_backward(logits_nv, total_n1, target_n1, elsewhere_n1)
        return (total_n1.log() - chosen_n1).squeeze(1)

    @staticmethod
    def backward(context: Any, gradient_n: Tensor) -> tuple[Tensor, None, None, None, None]:
        exponentials_nv, total_n1, target_n1, elsewhere_n1 = context.saved_tensors
        gradient_n1 = gradient_n.unsqueeze(1)
        scale_n1 = gradient_n1 / total_n1
        shift_n1 = -gradient_n1.masked_fill(elsewhere_n1, 0.0)
        for rows in _rows(exponentials_nv):
            exponentials_nv[rows, : context.true].mul_(scale_n1[rows])
            exponentials_nv[rows].scatter_add_(1, target_n1[rows], shift_n1[rows])
        return exponentials_nv, None, None, None, None


def _rows(logits_nv: Tensor) -> list[slice]:
    step = max(ROWS, LOGITS // logits_nv.shape[1])
    return [slice(start, start + step) for start in range(0, len(logits_nv), step)]


def _largest(logits_nv: Tensor) -> Tensor:
    """Each row's largest, ``[n, 1]``; the least number there is where there are no columns."""
    if not logits_nv.shape[1]:
        return logits_nv.new_full((len(logits_nv), 1), torch.finfo(logits_nv.dtype).min)
    return torch.cat([logits_nv[rows].amax(1, keepdim=True) for rows in _rows(logits_nv)])


def vocabulary_cross_entropy(
    logits: Tensor, labels: Tensor, *, true_vocabulary: int, rank: int, group: Any
) -> Tensor:
    """The loss of each token, in fp32, over the true vocabulary.

    Args:
        logits: ``[..., v]``, this rank's columns; overwritten if they are fp32.
        labels: ``[...]``, global token numbers.
        true_vocabulary: columns from here on are padding and get no probability.
        rank, group: this rank's place among those that share the vocabulary.
    """
    columns = logits.shape[-1]
    first = rank * columns
    true = min(columns, max(0, true_vocabulary - first))
    logits_nv = logits.float().flatten(0, -2)
    losses_n = _CrossEntropy.apply(logits_nv, labels.flatten(), first, true, group)
    return losses_n.view_as(labels)
