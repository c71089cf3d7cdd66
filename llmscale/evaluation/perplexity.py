"""Strided perplexity and bits per byte of a causal language model.

Shape legend: b windows, s positions, v vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from llmscale.evaluation.bootstrap import interval
from llmscale.parallel import shares

IGNORED = -100
TOKENS_A_PASS = 4096


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


def likelihoods(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    length: int,
    stride: int,
    tokens_a_pass: int = TOKENS_A_PASS,
    on_text: Callable[[int], None] = lambda texts: None,
) -> list[Likelihood]:
    """Scores texts, each on its own after the token that texts begin with.

    Ranks that have met share them; collective then.

    Args:
        model: a causal language model of ``transformers``.
        tokens_a_pass: how many tokens go through the model at once, one window at least; no
            figure depends on it.
        on_text: is told how many texts are done.
    """
    all_texts, ranks = list(texts), shares.place()[1]

    def scored(some: list[str]) -> list[Likelihood]:
        def tell(done: int) -> None:
            on_text(min(done * ranks, len(all_texts)))

        return _own_likelihoods(model, tokenizer, some, length, stride, tokens_a_pass, tell)

    return shares.shared(all_texts, scored)


def _own_likelihoods(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    length: int,
    stride: int,
    tokens_a_pass: int,
    on_text: Callable[[int], None],
) -> list[Likelihood]:
    found: list[Likelihood] = []
    waiting: list[_Window] = []
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        found.append(Likelihood(0.0, len(ids), len(text.encode())))
        for pair in windows([start, *ids], length, stride):
            waiting.append(_Window(number, *pair))
            if _room(waiting) > tokens_a_pass and len(waiting) > 1:
                _add_nats(model, waiting[:-1], found)
                waiting = waiting[-1:]
                on_text(number)
    if waiting:
        _add_nats(model, waiting, found)
    on_text(len(found))
    return found


def likelihood(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    length: int,
    stride: int,
    on_text: Callable[[int], None] = lambda texts: None,
) -> Likelihood:
    """The sum of ``likelihoods``."""
    each = likelihoods(model, tokenizer, texts, length=length, stride=stride, on_text=on_text)
    return sum(each, Likelihood())


def likelihood_intervals(each: Sequence[Likelihood], seed: int) -> dict[str, list[float]]:
    """95 % intervals of perplexity and bits per byte over texts; none of a single text."""
    sums_n3 = np.array([(one.nats, one.tokens, one.text_bytes) for one in each if one.tokens])
    if len(sums_n3) < 2:
        return {}

    def figure(name: str) -> list[float]:
        def of(drawn: np.ndarray) -> float:
            return Likelihood(*sums_n3[drawn].sum(0)).metrics()[name]

        return interval(of, [0] * len(sums_n3), seed)

    return {f"{name}_interval": figure(name) for name in ("perplexity", "bits_per_byte")}


class _Window(NamedTuple):
    """Which text it is of, and what ``windows`` says of it."""

    text: int
    inputs: list[int]
    labels: list[int]


def _room(waiting: Sequence[_Window]) -> int:
    return len(waiting) * max(len(window.inputs) for window in waiting)


def _add_nats(model: Any, passed: Sequence[_Window], found: list[Likelihood]) -> None:
    for window, nats in zip(passed, _nats(model, passed), strict=True):
        found[window.text] += Likelihood(nats=nats)


@torch.no_grad()
def _nats(model: Any, passed: Sequence[_Window]) -> list[float]:
    longest = max(len(window.inputs) for window in passed)

    def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor(
            [row + [filler] * (longest - len(row)) for row in rows], device=model.device
        )

    inputs_bs = padded([window.inputs for window in passed], 0)
    labels_bs = padded([window.labels for window in passed], IGNORED)
    mask_bs = padded([[1] * len(window.inputs) for window in passed], 0)
    logits_bsv = model(input_ids=inputs_bs, attention_mask=mask_bs).logits[:, -longest:-1]
    losses = (
        F.cross_entropy(logits_sv.float(), labels_s[1:], ignore_index=IGNORED, reduction="none")
        for logits_sv, labels_s in zip(logits_bsv, labels_bs, strict=True)
    )
    return [float(loss_s.double().sum()) for loss_s in losses]


def unigram_entropy(counts: Iterable[int]) -> float:
    """The entropy, in nats a token, of the distribution of token counts."""
    present = [count for count in counts if count]
    total = sum(present)
    return -sum(count / total * math.log(count / total) for count in present)
