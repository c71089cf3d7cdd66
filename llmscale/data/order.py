"""The order of samples as a function, not an index: nothing to build, store or resume.

A permutation of ``range(size)`` is made of a balanced Feistel network over the next power
of four, walked until it lands below ``size`` (cycle walking; Black and Rogaway 2002).
"""

import hashlib
from functools import lru_cache

ROUNDS = 6


def number_at(consumed: int, size: int, seed: int) -> int:
    """Which of ``size`` samples comes after ``consumed`` others; every epoch has its own order."""
    epoch, index = divmod(consumed, size)
    return _epoch_order(size, seed, epoch)[index]


@lru_cache(maxsize=8)
def _epoch_order(size: int, seed: int, epoch: int) -> "Permutation":
    return Permutation(size, (seed, epoch))


class Permutation:
    """A pseudo-random permutation of ``range(size)``, the same for the same key."""

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        if size < 1:
            raise ValueError("a permutation needs at least one element")
        self._size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
        self._round_keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "big") for i in range(ROUNDS)]

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self._size:
            raise IndexError(index)
        value = self._encrypt(index)
        while value >= self._size:
            value = self._encrypt(value)
        return value

    def _encrypt(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return left << self._half_bits | right


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31
