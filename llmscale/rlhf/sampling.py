"""Sampling that depends on a seed and an answer's number alone, not on its batch or rank.

Shape legend: b answers, v vocabulary.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

NUMBERS_AT_ONCE = 4096
"""Random numbers that a row draws in a call, unless fewer are needed: calls cost, too."""


class NumberedSampler(LogitsProcessor):
    """Draws each row's next token with numbers of its own, and notes its log-probability.

    The largest of ``logits / temperature`` plus Gumbel noise is a sample of the softmax (Gumbel
    1954), so that a greedy search over what this returns samples.

    Args:
        keys: a seed for each row.
        most: tokens that a row draws at most; it decides which numbers are drawn.
        device: where numbers are drawn; one's are not another's.
    """

    def __init__(
        self,
        keys: Sequence[int],
        temperature: float,
        most: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._generators = [torch.Generator(device).manual_seed(key) for key in keys]
        self._temperature, self._most = temperature, most
        self._noises: Iterator[Tensor] = iter(())
        self.log_probabilities: list[Tensor] = []
        """Of the tokens drawn at each step, ``[b]``."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits_bv = scores.float() / self._temperature
        noise_bv = next(self._noises, None)
        if noise_bv is None:
            self._noises = self._drawn(scores.shape[1])
            noise_bv = next(self._noises)
        noised_bv = logits_bv + noise_bv.to(scores.device)
        drawn_b1 = noised_bv.argmax(1, keepdim=True)
        chosen_b = logits_bv.gather(1, drawn_b1)[:, 0] - logits_bv.logsumexp(1)
        self.log_probabilities.append(chosen_b)
        return torch.full_like(noised_bv, -math.inf).scatter(1, drawn_b1, 0.0)

    def _drawn(self, vocabulary: int) -> Iterator[Tensor]:
        """Gumbel noise ``[b, v]`` of some steps, drawn at once where it is little."""
        steps = max(1, min(NUMBERS_AT_ONCE // vocabulary, self._most))
        drawn = [
            torch.empty(steps, vocabulary, device=generator.device).exponential_(
                generator=generator
            )
            for generator in self._generators
        ]
        yield from -torch.stack(drawn, 1).log()
