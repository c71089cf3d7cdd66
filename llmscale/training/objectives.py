"""Objectives: from samples of tokens to what a model is to predict.

Losses are summed, never averaged, so that any split of a batch gives the same gradient.
Shape legend: b samples, s sequence length, t tokens that T5's decoder predicts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llmscale.data.span_lengths import span_lengths
from llmscale.data.spans import corrupted, span_starts_and_ends
from llmscale.training.batches import ModelBatch, SpanBatch, TokenBatch, spans_alone, tokens_alone


class Objective(Protocol):
    """Makes batches of samples; each is a function of the sample and its place alone."""

    def sample_length(self, sequence_length: int) -> int:
        """Tokens of text that make one sample of the model's sequence length."""

    def batch(self, windows: np.ndarray, places: Sequence[int], device: torch.device) -> ModelBatch:
        """A batch of windows ``[b, sample_length + 1]`` at these places of the order."""


@dataclass(frozen=True)
class Causal:
    """Every next token is predicted.

    Args:
        document_end: the token that ends a document, if documents packed into one sample are
            to be kept apart: none sees another, positions begin anew in each, and the
            first token of one is not predicted from the last of another.
    """

    document_end: int | None = None

    def sample_length(self, sequence_length: int) -> int:
        return sequence_length

    def batch(self, windows: np.ndarray, places: Sequence[int], device: torch.device) -> TokenBatch:
        whole = torch.from_numpy(windows).to(device)
        tokens = whole[:, :-1].contiguous()
        batch = replace(tokens_alone(tokens), labels_bs=whole[:, 1:].contiguous())
        return batch if self.document_end is None else _apart(batch, self.document_end)


def _apart(batch: TokenBatch, document_end: int) -> TokenBatch:
    ends_bs = batch.tokens_bs == document_end
    starts_bs = torch.zeros_like(ends_bs)
    starts_bs[:, 1:] = ends_bs[:, :-1]
    first_bs = torch.where(starts_bs, batch.positions_bs, 0).cummax(1).values
    return replace(
        batch,
        mask_bs=batch.mask_bs * ~ends_bs,
        positions_bs=batch.positions_bs - first_bs,
        segments_bs=starts_bs.cumsum(1).int(),
    )


@dataclass(frozen=True)
class Spans:
    """Spans taken out of a text are predicted from the rest (Raffel et al. 2020, section 3.3).

    Which spans is a function of the seed and the sample's place alone.

    Args:
        sequence_length: tokens of the encoder's input.
        sentinels: the tokens that stand for the spans, at least as many as there are spans.
        padding: the token that the decoder starts from.
        end: the token that closes input and target.
    """

    sequence_length: int
    sentinels: tuple[int, ...]
    padding: int
    end: int
    seed: int

    def sample_length(self, sequence_length: int) -> int:
        return span_lengths(sequence_length).text

    def batch(self, windows: np.ndarray, places: Sequence[int], device: torch.device) -> SpanBatch:
        pairs = [self._pair(w, place) for w, place in zip(windows, places, strict=True)]
        parts = (np.stack(part) for part in zip(*pairs, strict=True))
        inputs, targets = (torch.from_numpy(part).to(device) for part in parts)
        start_b1 = torch.full_like(targets[:, :1], self.padding)
        batch = spans_alone(inputs, torch.cat([start_b1, targets[:, :-1]], 1))
        return replace(batch, labels_bs=targets)

    def _pair(self, window: np.ndarray, place: int) -> tuple[np.ndarray, np.ndarray]:
        lengths = span_lengths(self.sequence_length)
        spans = span_starts_and_ends(lengths, np.random.default_rng((self.seed, place)))
        sentinels = np.array(self.sentinels[: lengths.spans])
        return corrupted(window[: lengths.text], spans, sentinels, self.end)


def masked_sum(losses_bs: Tensor, mask_bs: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss and the number of tokens it was summed over."""
    return (losses_bs.float() * mask_bs).sum(), mask_bs.sum().to(torch.int)
