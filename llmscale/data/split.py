"""Splits that never leak: a document's place depends on its own text and the seed alone."""

import hashlib
import math
from collections.abc import Iterable


def position(text: str, seed: int) -> float:
    """A number in [0, 1) from a text: equal documents always fall on the same side."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def validation_threshold(fraction: float, positions: Iterable[float]) -> float:
    """What is placed below it goes to validation; at least one does, unless the fraction is 0.

    Args:
        positions: of all that is to be split; not looked at where the fraction is 0.
    """
    if fraction == 0:
        return 0.0
    return max(fraction, math.nextafter(min(positions, default=0.0), 1.0))
