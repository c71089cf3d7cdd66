"""Independent pieces of work, dealt out to the ranks in turn."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch.distributed as dist

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_turns(
    work: Callable[[Item], Result], items: Iterable[Item], rank: int, ranks: int
) -> Iterator[Result]:
    """What ``work`` makes of each item, in order, on rank 0; nothing on the others.

    Collective where there are several ranks: all are given the same items, each works on every
    so many-th of them, and each has to come to the end of this.
    """
    iterator = iter(items)
    while dealt := list(islice(iterator, ranks)):
        own = work(dealt[rank]) if rank < len(dealt) else None
        if ranks == 1:
            results = [own]
        else:
            results = [None] * ranks
            dist.gather_object(own, results if rank == 0 else None)
        if rank == 0:
            yield from results[: len(dealt)]  # type: ignore[misc]
