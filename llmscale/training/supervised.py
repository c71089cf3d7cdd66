"""Supervised fine-tuning: the next token, where an assistant says it.

Shape legend: b samples, s tokens a sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from llmscale.data.chat import Example
from llmscale.data.examples import ExampleSamples
from llmscale.training.batches import ModelBatch, TokenBatch
from llmscale.training.data import Blended


class _Row(NamedTuple):
    """One sample of a batch; the padding behind its examples is a segment of its own."""

    tokens_s: np.ndarray
    labels_s: np.ndarray
    mask_s: np.ndarray
    positions_s: np.ndarray
    segments_s: np.ndarray


@dataclass(frozen=True)
class Supervised:
    """Makes batches of samples that each hold some examples.

    Loss is taken on learned tokens alone. Examples in one sample do not see each other, and
    positions begin anew in each.

    Args:
        padding: the token that fills samples up; it stands behind all others, which do not
            see it.
        room: tokens a sample has at most.
        multiple: of which the number of tokens is one, as a layout may need.
        several: whether samples hold several examples.
    """

    padding: int
    room: int
    multiple: int
    several: bool

    def length(self, longest: int) -> int:
        """The model's tokens a sample, where the longest of a step has that many."""
        return min(self.room, -(-longest // self.multiple) * self.multiple)

    def batch(
        self, samples: Sequence[Sequence[Example]], length: int, device: torch.device
    ) -> TokenBatch:
        """A batch of samples, each filled up to that length."""
        rows = [self._row(examples, length) for examples in samples]
        columns = (np.stack(column) for column in zip(*rows, strict=True))
        tokens_bs, labels_bs, mask_bs, positions_bs, segments_bs = (
            torch.from_numpy(column).to(device) for column in columns
        )
        return TokenBatch(
            tokens_bs, labels_bs, mask_bs, positions_bs, segments_bs if self.several else None
        )

    def _row(self, examples: Sequence[Example], length: int) -> _Row:
        row = _Row(
            np.full(length, self.padding, dtype=np.int64),
            np.full(length, self.padding, dtype=np.int64),
            np.zeros(length, dtype=np.float32),
            np.zeros(length, dtype=np.int64),
            np.full(length, len(examples), dtype=np.int32),
        )
        first = 0
        for number, example in enumerate(examples):
            end = first + len(example)
            row.tokens_s[first:end] = example.tokens_n
            row.labels_s[first : end - 1] = example.tokens_n[1:]
            row.mask_s[first : end - 1] = example.learned_n[1:]
            row.positions_s[first:end] = np.arange(len(example))
            row.segments_s[first:end] = number
            first = end
        row.positions_s[first:] = np.arange(length - first)
        return row


@dataclass(frozen=True)
class SupervisedSamples:
    """The samples of fine-tuning: those of its data sets in turn, by their weights."""

    sources: Mapping[str, ExampleSamples]
    weights: Mapping[str, float]
    objective: Supervised
    first_step: int = 0

    @cached_property
    def _blended(self) -> Blended[ExampleSamples]:
        return Blended(self.sources, self.weights)

    def batch(self, places: Sequence[int], length: int, device: torch.device) -> ModelBatch:
        found = [self._blended.find(place) for place in places]
        samples = [source.sample(number) for source, number in found]
        return self.objective.batch(samples, length, device)

    def length(self, step: range) -> int:
        return self.objective.length(max(self._lengths(step)))

    def tokens(self, step: range) -> int:
        return sum(self._lengths(step))

    def name(self, place: int) -> str:
        return self._blended.name(place)

    def _lengths(self, step: range) -> list[int]:
        found = [self._blended.find(place) for place in step]
        return [source.length(number) for source, number in found]


@dataclass(frozen=True)
class SupervisedValidation:
    """The first samples of every data set, at most ``most`` of each, one set after another."""

    sources: Sequence[ExampleSamples]
    most: int
    objective: Supervised

    @cached_property
    def _samples(self) -> list[list[Example]]:
        return [
            source.sample(number)
            for source in self.sources
            for number in range(min(len(source), self.most))
        ]

    @cached_property
    def _length(self) -> int:
        return self.objective.length(max(sum(map(len, sample)) for sample in self._samples))

    def __len__(self) -> int:
        return len(self._samples)

    def batch(self, numbers: Sequence[int], device: torch.device) -> ModelBatch:
        present = [self._samples[min(number, len(self) - 1)] for number in numbers]
        counts_b = torch.tensor([number < len(self) for number in numbers], device=device)
        return self.objective.batch(present, self._length, device).counting(counts_b)
