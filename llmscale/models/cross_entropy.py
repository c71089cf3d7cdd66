"""Cross entropy over a vocabulary split by columns, in few passes over the logits.

Shape legend: n tokens, v this rank's columns of the vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ROWS = 64
"""Tokens handled at a time: their logits stay in a core's cache between the passes."""


class _CrossEntropy(torch.autograd.Function):
    """``log sum exp(logits) - logits[label]`` a token; overwrites the logits it is given."""

    @staticmethod
    def forward(
        context: Any, logits_nv: Tensor, labels_n: Tensor, first: int, group: Any
    ) -> Tensor:
        columns = logits_nv.shape[1]
        target_n1 = (labels_n - first).unsqueeze(1)
        elsewhere_n1 = (target_n1 < 0) | (target_n1 >= columns)
        target_n1 = target_n1.masked_fill(elsewhere_n1, 0)
        largest_n1 = torch.cat([part.amax(1, keepdim=True) for part in logits_nv.split(ROWS)])
        if group.size() > 1:
            dist.all_reduce(largest_n1, op=dist.ReduceOp.MAX, group=group)
        chosen_n1, total_n1 = torch.empty_like(largest_n1), torch.empty_like(largest_n1)
        for start in range(0, len(logits_nv), ROWS):
            rows = slice(start, start + ROWS)
            part = logits_nv[rows].sub_(largest_n1[rows])
            torch.gather(part, 1, target_n1[rows], out=chosen_n1[rows])
            torch.sum(part.exp_(), 1, keepdim=True, out=total_n1[rows])
        chosen_n1.masked_fill_(elsewhere_n1, 0.0)
        if group.size() > 1:
            dist.all_reduce(chosen_n1, group=group)
            dist.all_reduce(total_n1, group=group)
        context.save_for_backward(logits_nv, total_n1, target_n1, elsewhere_n1)
        return (total_n1.log() - chosen_n1).squeeze(1)

    @staticmethod
    def backward(context: Any, gradient_n: Tensor) -> tuple[Tensor, None, None, None]:
        exponentials_nv, total_n1, target_n1, elsewhere_n1 = context.saved_tensors
        gradient_n1 = gradient_n.unsqueeze(1)
        scale_n1 = gradient_n1 / total_n1
        shift_n1 = -gradient_n1.masked_fill(elsewhere_n1, 0.0)
        for start in range(0, len(exponentials_nv), ROWS):
            rows = slice(start, start + ROWS)
            part = exponentials_nv[rows].mul_(scale_n1[rows])
            part.scatter_add_(1, target_n1[rows], shift_n1[rows])
        return exponentials_nv, None, None, None


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
    logits_nv = logits.float().flatten(0, -2)
    if first + columns > true_vocabulary:
        logits_nv[:, max(0, true_vocabulary - first) :] = torch.finfo(torch.float32).min
    losses_n = _CrossEntropy.apply(logits_nv, labels.flatten(), first, group)
    return losses_n.view_as(labels)
