"""Several examples in one sample, so that little of it is padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """The numbers of the examples that share each sample of ``room`` tokens.

    The longest first, each into the fullest sample that still has room for it (best-fit
    decreasing; Johnson 1973), which needs at most 11/9 of the fewest samples, and one.
    Equal lengths keep their order; within a sample and among samples the order is that of
    the examples.

    Raises:
        ValueError: if an example is longer than that.
    """
    samples: list[list[int]] = []
    free: list[tuple[int, int]] = []
    """Tokens left, and the sample's number, ascending."""
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        if length > room:
            raise ValueError(f"example {number} has {length} tokens, above {room}")
        place = bisect_left(free, (length, -1))
        left, sample = free.pop(place) if place < len(free) else (room, len(samples))
        if sample == len(samples):
            samples.append([])
        samples[sample].append(number)
        insort(free, (left - length, sample))
    return sorted(sorted(sample) for sample in samples)
