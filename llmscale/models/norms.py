"""Norms behind megatron-core's layer spec that allow sequence parallelism on any device."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _RootMeanSquare(torch.autograd.Function):
    """RMSNorm (Zhang and Sennrich 2019, equation 4); its sums are matrix-vector products."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        scale = norm.square_().div_(hidden.shape[-1]).add_(epsilon).rsqrt_()
        context.save_for_backward(hidden, weight, scale)
        return (hidden * scale).mul_(weight)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, scale = context.saved_tensors
        width = hidden.shape[-1]
        product = gradient * hidden
        rows = product.view(-1, width)
        weight_gradient = torch.mv(rows.t(), scale.view(-1))
        correction = torch.mv(rows, weight).view_as(scale).mul_(scale).mul_(scale).div_(width)
        hidden_gradient = torch.mul(gradient, weight, out=product)
        hidden_gradient.addcmul_(hidden, correction, value=-1).mul_(scale)
        return hidden_gradient, weight_gradient, None


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
        if self.bias is not None:
            return F.layer_norm(hidden, shape, self.weight, self.bias, self.eps)
        if hidden.device.type == "cpu" and hidden.dtype == torch.float32:
            return _RootMeanSquare.apply(hidden.contiguous(), self.weight, self.eps)
        return F.rms_norm(hidden, shape, self.weight, self.eps)
