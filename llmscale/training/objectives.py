"""Objectives: from samples of tokens to what a model is to predict.

Losses are summed, never averaged, so that any split of a batch gives the same gradient.
Shape legend: b samples, s sequence length, t tokens that T5's decoder predicts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from llmscale.data.span_lengths import span_lengths
from llmscale.data.spans import corrupted, span_starts_and_ends
from llmscale.training.batches import ModelBatch, SpanBatch, TokenBatch, spans_alone, tokens_alone

MASKED_SHARE, REPLACED_BY_MASK, KEPT = 0.15, 0.8, 0.1


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
            to be kept apart: none sees another, learned positions begin anew in each (rotary
            ones are relative), and the first token of one is not predicted from the last of
            another.
    """

    document_end: int | None = None

    def sample_length(self, sequence_length: int) -> int:
        return sequence_length

    def batch(self, windows: np.ndarray, places: Sequence[int], device: torch.device) -> TokenBatch:
        whole = torch.from_numpy(windows).to(device)
        tokens = whole[:, :-1].contiguous()
        batch = replace(tokens_alone(tokens), labels_bs=whole[:, 1:].contiguous())
        return batch if self.document_end is None else _apart(batch, self.document_end)


@dataclass(frozen=True)
class Masked:
    """Some tokens of each sample are to be guessed (Devlin et al. 2019, section 3.1).

    Of a sample's ordinary tokens 15% are chosen, at least one; of these, in the mean, 80%
    become the mask token, 10% a random ordinary token, and 10% stay.

    Args:
        seed: of the choice, together with the sample's place.
        vocabulary: tokens of the tokenizer; the random ones are among them.
        special_tokens: tokens that are never chosen nor put in.
        document_end: the token that ends a document, if documents are to be kept apart, as
            in ``Causal``.
    """

    seed: int
    vocabulary: int
    mask_token: int
    special_tokens: tuple[int, ...]
    document_end: int | None = None

    def sample_length(self, sequence_length: int) -> int:
        return sequence_length

    def batch(self, windows: np.ndarray, places: Sequence[int], device: torch.device) -> TokenBatch:
        labels = np.ascontiguousarray(windows[:, :-1])
        tokens, chosen = labels.copy(), np.zeros(labels.shape, np.float32)
        for row, place in enumerate(places):
            self._mask(tokens[row], chosen[row], np.random.default_rng((self.seed, place)))
        batch = replace(
            tokens_alone(torch.from_numpy(tokens).to(device)),
            labels_bs=torch.from_numpy(labels).to(device),
            mask_bs=torch.from_numpy(chosen).to(device),
        )
        return batch if self.document_end is None else _apart(batch, self.document_end)

    def _mask(
        self, tokens_s: np.ndarray, chosen_s: np.ndarray, random: np.random.Generator
    ) -> None:
        """Replaces tokens of one sample, and writes down which were chosen."""
        ordinary = np.flatnonzero(~np.isin(tokens_s, self.special_tokens))
        count = min(len(ordinary), max(1, round(MASKED_SHARE * len(ordinary))))
        places = random.permutation(ordinary)[:count]
        lot = random.random(count)
        changed = places[(lot >= REPLACED_BY_MASK) & (lot < 1 - KEPT)]
        chosen_s[places] = 1
        tokens_s[places[lot < REPLACED_BY_MASK]] = self.mask_token
        tokens_s[changed] = random.choice(self._ordinary_tokens, len(changed))

    @cached_property
    def _ordinary_tokens(self) -> np.ndarray:
        return np.setdiff1d(np.arange(self.vocabulary), self.special_tokens)


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


def make_objective(
    kind: str,
    tokens: Mapping[str, Any],
    *,
    sequence_length: int,
    seed: int,
    separate_documents: bool = False,
) -> Objective:
    """The objective of a family of models.

    Args:
        kind: ``causal``, ``masked`` or ``spans``.
        tokens: the tokenizer's numbers, as ``tokens.json`` holds them.
    """
    document_end = tokens["end_of_text"] if separate_documents else None
    if kind == "causal":
        return Causal(document_end)
    if kind == "masked":
        return Masked(
            seed=seed,
            vocabulary=tokens["tokenizer_size"],
            mask_token=tokens["mask_token"],
            special_tokens=tuple(tokens["special_tokens"]),
            document_end=document_end,
        )
    return Spans(
        sequence_length=sequence_length,
        sentinels=tuple(tokens["sentinels"]),
        padding=tokens["padding"],
        end=tokens["end_of_text"],
        seed=seed,
    )
