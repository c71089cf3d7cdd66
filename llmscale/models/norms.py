"""Norms behind megatron-core's layer spec that allow sequence parallelism on any device."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm, as the Megatron configuration says.

    Under sequence parallelism each rank normalizes its own part of the sequence, so the
    parameters are marked for their gradients to be summed over the tensor-parallel group.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.bias = (
            torch.nn.Parameter(torch.zeros(hidden_size))
            if config.normalization == "LayerNorm"
            else None
        )
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalizes the last dimension."""
        shape = (hidden.shape[-1],)
        if self.bias is None:
            return F.rms_norm(hidden, shape, self.weight, self.eps)
        return F.layer_norm(hidden, shape, self.weight, self.bias, self.eps)
