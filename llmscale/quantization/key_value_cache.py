"""Scales of an attention's keys and values, for caches that keep them in 8 bits.

Shape legend: s positions, k heads of keys and values, h size of a head, c = k times h channels.
"""

from typing import Any

import torch
from torch import Tensor

from llmscale.errors import RecipeError
from llmscale.parallel import shares
from llmscale.quantization.families import SCALED_FAMILIES
from llmscale.quantization.grids import E4M3_MOST, stored_scale
from llmscale.quantization.schemes import CacheNumber

CACHED_FAMILIES = SCALED_FAMILIES
"""Families whose attention is called as below, and asks its cache to take in keys and values."""

ATTENTION = "self_attn"
GREATEST_CODES = {"int8": 127.5, "fp8": E4M3_MOST}


class SeenCache:
    """Stands in for a cache that keeps nothing, and notes how large keys and values are."""

    def __init__(self) -> None:
        self.keys_c = torch.zeros(1)
        self.values_c = torch.zeros(1)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Takes in keys, their positions rotated in, and values [1, k, s, h]; gives them back."""
        self.keys_c = torch.maximum(self.keys_c, _largest(keys))
        self.values_c = torch.maximum(self.values_c, _largest(values))
        return keys, values

    def scales(self, number: CacheNumber, dtype: torch.dtype) -> dict[str, Tensor]:
        """The greatest magnitudes over the greatest code, by their names in a block; collective.

        Raises:
            RecipeError: if they are not finite.
        """
        found = {}
        for name, largest_c in (("k_scale", self.keys_c), ("v_scale", self.values_c)):
            largest = shares.greatest(largest_c.max())
            if not largest.isfinite():
                raise RecipeError("keys or values are not finite; give other texts to calibrate")
            scale = (largest / GREATEST_CODES[number]).reshape(1)
            found[f"{ATTENTION}.{name}"] = stored_scale(scale, dtype).to(dtype)
        return found


def _largest(states: Tensor) -> Tensor:
    return states.abs().amax((0, 2)).flatten()
