"""Context parallelism: the tokens of every sequence, split over a group of ranks.

Of 2n equal pieces of a sequence, rank r of n holds pieces r and 2n - 1 - r: under a causal
mask all ranks then have the same work (Dubey et al. 2024, section 3.3.2).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def own_places(length: int, rank: int, ranks: int) -> Tensor:
    """Where this rank's tokens stand in the whole sequence: ``[length / ranks]``."""
    places = torch.arange(length)
    if ranks == 1:
        return places
    pieces = places.chunk(2 * ranks)
    return torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]])


def all_places(length: int, ranks: int) -> Tensor:
    """The places of all ranks' tokens, rank after rank: ``[length]``."""
    return torch.cat([own_places(length, rank, ranks) for rank in range(ranks)])


class _WholeSequence(torch.autograd.Function):
    """All ranks' tokens in order; the gradient goes back summed to the rank that holds each."""

    @staticmethod
    def forward(context: Any, own: Tensor, group: Any) -> Tensor:
        context.group = group
        ranks, length = group.size(), own.shape[0] * group.size()
        gathered = own.new_empty(length, *own.shape[1:])
        dist.all_gather_into_tensor(gathered, own.contiguous(), group=group)
        whole = torch.empty_like(gathered)
        whole[all_places(length, ranks).to(own.device)] = gathered
        return whole

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        group = context.group
        length = gradient.shape[0]
        by_rank = gradient[all_places(length, group.size()).to(gradient.device)]
        own = by_rank.new_empty(length // group.size(), *by_rank.shape[1:])
        dist.reduce_scatter_tensor(own, by_rank.contiguous(), group=group)
        return own, None


def whole_sequence(own: Tensor, group: Any) -> Tensor:
    """Gathers the first dimension of ``own`` over a context-parallel group, in order."""
    return _WholeSequence.apply(own, group) if group.size() > 1 else own
