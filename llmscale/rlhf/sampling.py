"""Sampling that depends on a seed and an answer's number alone, not on its batch or rank.

Shape legend: b answers, v vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


class NumberedSampler(LogitsProcessor):
    """Draws each row's next token with numbers of its own, and notes its log-probability.

    The largest of ``logits / temperature`` plus Gumbel noise is a sample of the softmax (Gumbel
    1954), so that a greedy search over what this returns samples.

    Args:
        keys: a seed for each row.
    """

    def __init__(self, keys: Sequence[int], temperature: float) -> None:
        self._generators = [torch.Generator().manual_seed(key) for key in keys]
        self._temperature = temperature
        self.log_probabilities: list[Tensor] = []
        """Of the tokens drawn at each step, ``[b]``."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits_bv = scores.float() / self._temperature
        noise_bv = torch.stack(
            [
                torch.empty(scores.shape[1]).exponential_(generator=generator)
                for generator in self._generators
            ]
        ).to(scores.device)
        noised_bv = logits_bv - noise_bv.log()
        drawn_b1 = noised_bv.argmax(1, keepdim=True)
        chosen_b = logits_bv.gather(1, drawn_b1)[:, 0] - logits_bv.logsumexp(1)
        self.log_probabilities.append(chosen_b)
        return torch.full_like(noised_bv, -math.inf).scatter(1, drawn_b1, 0.0)
