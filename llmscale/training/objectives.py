"""Objectives: from a model's outputs and a batch to a loss as (sum, count).

Losses are summed, never averaged, so that any split of a batch gives the same gradient.
Shape legend: b samples, s sequence length.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class CausalBatch:
    """Tokens, the next tokens, and which of them count."""

    tokens_bs: Tensor
    labels_bs: Tensor
    mask_bs: Tensor
    positions_bs: Tensor


def causal_batch(windows: np.ndarray, device: torch.device) -> CausalBatch:
    """A batch from windows of ``s + 1`` tokens; every next token counts."""
    whole = torch.from_numpy(windows).to(device)
    tokens = whole[:, :-1].contiguous()
    return replace(tokens_alone(tokens), labels_bs=whole[:, 1:].contiguous())


def tokens_alone(tokens_bs: Tensor) -> CausalBatch:
    """A batch to look at, not to learn from: every token is its own label."""
    positions = torch.arange(tokens_bs.shape[1], device=tokens_bs.device).expand_as(tokens_bs)
    ones = torch.ones(tokens_bs.shape, dtype=torch.float32, device=tokens_bs.device)
    return CausalBatch(tokens_bs, tokens_bs, ones, positions)


def causal_loss(losses_bs: Tensor, batch: CausalBatch) -> tuple[Tensor, Tensor]:
    """The summed loss and the number of tokens it was summed over."""
    return (losses_bs.float() * batch.mask_bs).sum(), batch.mask_bs.sum().to(torch.int)
