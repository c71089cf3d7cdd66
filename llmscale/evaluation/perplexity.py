"""Strided perplexity and bits per byte of a causal language model.

Shape legend: b windows, s positions, v vocabulary.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

IGNORED = -100
WINDOWS_A_BATCH = 16


@dataclass(frozen=True)
class Likelihood:
    """What a model gives to texts, summed: nats, over tokens and over UTF-8 bytes."""

    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0

    def __add__(self, other: "Likelihood") -> "Likelihood":
        return Likelihood(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.text_bytes + other.text_bytes,
        )

    def metrics(self) -> dict[str, float]:
        """Perplexity a token, bits per byte (Gao et al. 2020, section 3.1), loss in nats."""
        loss = self.nats / self.tokens
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": self.nats / math.log(2) / self.text_bytes,
            "tokens": self.tokens,
        }


def windows(tokens: list[int], length: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """Inputs and labels of overlapping windows in which each token but the first counts once.

    Each window after the first scores only the tokens no earlier window has scored, and
    sees the tokens before them: at least one, so a stride is at most ``length - 1``.
    """
    stride = min(stride, length - 1)
    pairs = []
    scored_to = 1
    for begin in range(0, max(1, len(tokens) - 1), stride):
        inputs = tokens[begin : begin + length]
        end = begin + len(inputs)
        labels = [IGNORED] * (scored_to - begin) + tokens[scored_to:end]
        if end > scored_to:
            pairs.append((inputs, labels))
            scored_to = end
        if end == len(tokens):
            break
    return pairs


@torch.no_grad()
def likelihood(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    length: int,
    stride: int,
    on_text: Callable[[int], None] = lambda texts: None,
) -> Likelihood:
    """Scores texts, each on its own after the end-of-text token, by a ``transformers`` model."""
    total = Likelihood()
    for number, text in enumerate(texts, 1):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        start = (
            tokenizer.bos_token_id
            if tokenizer.bos_token_id is not None
            else (tokenizer.eos_token_id)
        )
        pairs = windows([start, *ids], length, stride)
        nats = sum(
            _batch_nats(model, pairs[i : i + WINDOWS_A_BATCH])
            for i in range(0, len(pairs), WINDOWS_A_BATCH)
        )
        total += Likelihood(nats, len(ids), len(text.encode()))
        on_text(number)
    return total


def _batch_nats(model: Any, pairs: list[tuple[list[int], list[int]]]) -> float:
    longest = max(len(inputs) for inputs, _ in pairs)

    def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor(
            [row + [filler] * (longest - len(row)) for row in rows], device=model.device
        )

    inputs_bs = padded([inputs for inputs, _ in pairs], 0)
    labels_bs = padded([labels for _, labels in pairs], IGNORED)
    mask_bs = padded([[1] * len(inputs) for inputs, _ in pairs], 0)
    logits_bsv = model(input_ids=inputs_bs, attention_mask=mask_bs).logits[:, -longest:-1].float()
    loss = F.cross_entropy(
        logits_bsv.flatten(0, 1), labels_bs[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return float(loss)


def unigram_entropy(counts: Iterable[int]) -> float:
    """The entropy, in nats a token, of the distribution of token counts."""
    present = [count for count in counts if count]
    total = sum(present)
    return -sum(count / total * math.log(count / total) for count in present)
