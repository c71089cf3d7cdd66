"""Which source each sample of a blend comes from: a pattern that repeats, so nothing is stored.

Over a whole pattern every source has exactly its share, and at every prefix of the order it
is less than one sample away from it. Such orders exist for any shares; one is found by giving
each place, among the sources that may have it, to the one whose next sample is due first
(Tijdeman 1980, The chairman assignment problem).
"""

import math
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache

LONGEST_PATTERN = 100_000


def whole_shares(weights: Mapping[str, float]) -> tuple[int, ...]:
    """The smallest whole numbers in the ratio of positive weights, taken as they are written.

    Raises:
        ValueError: if they sum to more than ``LONGEST_PATTERN``.
    """
    written = [Fraction(str(weight)) for weight in weights.values()]
    common = math.lcm(*(weight.denominator for weight in written))
    whole = [int(weight * common) for weight in written]
    shares = tuple(share // math.gcd(*whole) for share in whole)
    if sum(shares) > LONGEST_PATTERN:
        raise ValueError(
            f"the weights repeat after more than {LONGEST_PATTERN} samples; "
            "round them to fewer digits"
        )
    return shares


class Blend:
    """Sources in turn, by weights whose whole shares sum to the pattern's length."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._names = tuple(weights)
        self._shares = whole_shares(weights)
        self._sources, self._before = _pattern(self._shares)

    def place(self, sample: int) -> tuple[str, int]:
        """The source of a sample of the blend, and how many of that source come before it."""
        rounds, slot = divmod(sample, len(self._sources))
        source = self._sources[slot]
        return self._names[source], rounds * self._shares[source] + self._before[slot]

    def counts(self, samples: int) -> dict[str, int]:
        """How many of the blend's first ``samples`` come from each source."""
        rounds, rest = divmod(samples, len(self._sources))
        begun = Counter(self._sources[:rest])
        shares = zip(self._names, self._shares, strict=True)
        return {name: rounds * share + begun[n] for n, (name, share) in enumerate(shares)}


@lru_cache(maxsize=64)
def _pattern(shares: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """The source at each place, and how many of it come before."""
    length = sum(shares)
    sources, before = [0] * length, [0] * length
    counts = [0] * len(shares)
    for place in range(length):
        allowed = (
            source
            for source, share in enumerate(shares)
            if counts[source] * length < (place + 1) * share
        )
        chosen = min(
            allowed, key=lambda source: -(-(counts[source] + 1) * length // shares[source])
        )
        sources[place], before[place] = chosen, counts[chosen]
        counts[chosen] += 1
    return sources, before
