"""Several examples in one sample, so that little of it is padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence

TRIES = 8
"""Rooms smaller than the largest that are tried when samples are to be of like lengths."""


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


def evenly_packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """As many samples as ``packed`` needs, but of lengths as near each other as a few tries find.

    Raises:
        ValueError: if an example is longer than ``room``.
    """
    samples = packed(lengths, room)
    least = max(*lengths, -(-sum(lengths) // len(samples)))
    for narrower in range(least, room, max(1, (room - least) // TRIES)):
        tried = packed(lengths, narrower)
        if len(tried) == len(samples):
            return tried
    return samples
