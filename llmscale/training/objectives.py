"""Objectives: from a model's outputs and a batch to a loss as (sum, count).

Losses are summed, never averaged, so that any split of a batch gives the same gradient.
Shape legend: b samples, s sequence length.
"""

from dataclasses import dataclass

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
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    ones = torch.ones(tokens.shape, dtype=torch.float32, device=device)
    return CausalBatch(tokens, whole[:, 1:].contiguous(), ones, positions)


def causal_loss(losses_bs: Tensor, batch: CausalBatch) -> tuple[Tensor, Tensor]:
    """The summed loss and the number of tokens it was summed over."""
    return (losses_bs.float() * batch.mask_bs).sum(), batch.mask_bs.sum().to(torch.int)
