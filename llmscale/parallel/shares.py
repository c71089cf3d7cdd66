"""Ranks that share a row of things to do, such as texts: each has some, and results are common.

Every function is collective where several ranks have met, and leaves things as they are where one
is alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

Given = TypeVar("Given")
Found = TypeVar("Found")
Row = TypeVar("Row", Tensor, list[Any])


def place() -> tuple[int, int]:
    """This rank's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def first() -> bool:
    """Whether this rank writes what is written once."""
    return place()[0] == 0


def own(everything: Row) -> Row:
    """This rank's share of a row: with three ranks every third."""
    rank, ranks = place()
    return everything[rank::ranks]


def together() -> None:
    """Waits until all ranks are here."""
    if place()[1] > 1:
        dist.barrier()


def by_first(found: Callable[[], Found]) -> Found:
    """What the first rank finds, on all of them."""
    given = [found() if first() else None]
    if place()[1] > 1:
        dist.broadcast_object_list(given)
    return given[0]  # type: ignore[return-value]


def added(tensor: Tensor) -> Tensor:
    """The sum over the ranks, in place."""
    if place()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def greatest(tensor: Tensor) -> Tensor:
    """The greatest of the ranks' numbers, in place."""
    if place()[1] > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def in_order(owned: Sequence[Found]) -> list[Found]:
    """What has come of the things that ``own`` dealt, of all ranks, in the order of the row."""
    _, ranks = place()
    parts: list[Sequence[Found]] = [owned]
    if ranks > 1:
        parts = [[] for _ in range(ranks)]
        dist.all_gather_object(parts, owned)
    return interleaved(parts)


def shared(row: list[Given], work: Callable[[list[Given]], Sequence[Found]]) -> list[Found]:
    """What work makes of each thing in a row, where ranks do a share each."""
    return in_order(work(own(row)))


def interleaved(parts: Sequence[Sequence[Found]]) -> list[Found]:
    """The ranks' shares as one row."""
    count = sum(map(len, parts))
    return [parts[number % len(parts)][number // len(parts)] for number in range(count)]
