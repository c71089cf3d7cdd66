"""Which prompts an iteration has: each once an epoch, as a function of the seed and its place."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from llmscale.data.prompts import Prompt, PromptSamples
from llmscale.training.data import Blended


@dataclass(frozen=True)
class PromptOrder:
    """The prompts of data sets in turn, by their weights."""

    sources: Mapping[str, PromptSamples]
    weights: Mapping[str, float]

    @cached_property
    def _blended(self) -> Blended[PromptSamples]:
        return Blended(self.sources, self.weights)

    def at(self, places: range) -> list[Prompt]:
        """Those at some places of the run's order."""
        found = (self._blended.find(place) for place in places)
        return [source.prompts[number] for source, number in found]


def sampling_key(*numbers: int | str) -> int:
    """A seed of 63 bits, the same for the same numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
