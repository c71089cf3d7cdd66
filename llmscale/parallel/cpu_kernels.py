"""The kernels megatron-core takes from Apex and Transformer Engine, in PyTorch for the CPU.

On a CPU the cost of everything but the matrix products is passes over memory. Each kernel
here is exact, and makes as few passes as PyTorch's own operators allow.

Shape legend: s sequence, b batch, g key-value groups, r query heads a group, d head size.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F


@contextmanager
def cpu_kernels() -> Iterator[None]:
    """Puts the kernels where megatron-core looks for those of CUDA packages."""
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer import attention, mlp

    with ExitStack() as stack:
        for module, name, kernel in (
            (attention, "HAVE_FUSED_QKV_ROPE", True),
            (attention, "apply_fused_qkv_rotary_pos_emb", fused_rotary),
            (mlp, "bias_swiglu_impl", swiglu),
            (layers, "_grad_accum_fusion_available", True),
            (layers, "fused_weight_gradient_mlp_cuda", WeightGradient),
        ):
            stack.enter_context(patch.object(module, name, kernel, create=True))
        yield


class WeightGradient:
    """Adds a linear layer's weight gradient to the gradient buffer by one matrix product."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, output_gradient: Tensor, main_grad: Tensor) -> None:
        """``main_grad += output_gradient^T inputs``; ``main_grad`` may be more precise."""
        if inputs.dtype == main_grad.dtype:
            main_grad.addmm_(output_gradient.t(), inputs)
        else:
            main_grad.add_(output_gradient.t() @ inputs)

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


class _Swiglu(torch.autograd.Function):
    """``silu(gate) * up`` (Shazeer 2020); keeps its input alone."""

    @staticmethod
    def forward(context: Any, gate_and_up: Tensor) -> Tensor:
        context.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (gate_and_up,) = context.saved_tensors
        gate, up = gate_and_up.chunk(2, -1)
        result = torch.empty_like(gate_and_up)
        gate_gradient, up_gradient = result.chunk(2, -1)
        torch.mul(gradient, F.silu(gate), out=up_gradient)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=gate_gradient)
        return result


def swiglu(gate_and_up: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
    """In the place of megatron-core's ``bias_swiglu_impl``."""
    return _Swiglu.apply(gate_and_up if bias is None else gate_and_up + bias)


def _rotate(source: Tensor, target: Tensor, cosine: Tensor, sine: Tensor) -> None:
    """Writes the rotation of ``source`` to ``target``; pairs lie half a head apart."""
    first, second = source.chunk(2, -1)
    first_target, second_target = target.chunk(2, -1)
    torch.mul(first, cosine, out=first_target).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=second_target).addcmul_(first, sine)


class _Rotary(torch.autograd.Function):
    """Splits ``[s, b, g, (r + 2) d]`` into rotated query, rotated key, and value.

    The three lie in memory as attention reads them, ``[b, heads, s, d]``, and are shown as
    ``[s, b, heads, d]`` (rotary positions: Su et al. 2021, section 3.4.2).
    """

    @staticmethod
    def forward(
        context: Any, mixed: Tensor, angles: Tensor, head: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        length, batch, groups, _ = mixed.shape
        parts = mixed.view(length, batch, groups, -1, head)
        ratio = parts.shape[3] - 2
        half = angles[..., : head // 2].unsqueeze(3)
        cosine, sine = half.cos().to(mixed.dtype), half.sin().to(mixed.dtype)
        query = mixed.new_empty(batch, groups, ratio, length, head)
        key = mixed.new_empty(batch, groups, 1, length, head)
        _rotate(parts[..., :ratio, :], query.permute(3, 0, 1, 2, 4), cosine, sine)
        _rotate(parts[..., ratio : ratio + 1, :], key.permute(3, 0, 1, 2, 4), cosine, sine)
        value = parts[..., ratio + 1, :].permute(1, 2, 0, 3).contiguous()
        context.save_for_backward(cosine, sine)
        context.shape = (length, batch, groups, ratio, head)
        query_s, key_s, value_s = (
            part.view(batch, -1, length, head).permute(2, 0, 1, 3) for part in (query, key, value)
        )
        return query_s, key_s, value_s

    @staticmethod
    def backward(
        context: Any, query_gradient: Tensor, key_gradient: Tensor, value_gradient: Tensor
    ) -> tuple[Tensor, None, None]:
        cosine, sine = context.saved_tensors
        length, batch, groups, ratio, head = context.shape
        result = query_gradient.new_empty(length, batch, groups, ratio + 2, head)
        query = query_gradient.reshape(length, batch, groups, ratio, head)
        key = key_gradient.reshape(length, batch, groups, 1, head)
        _rotate(query, result[..., :ratio, :], cosine, -sine)
        _rotate(key, result[..., ratio : ratio + 1, :], cosine, -sine)
        result[..., ratio + 1, :] = value_gradient
        return result.view(length, batch, groups, -1), None, None


def fused_rotary(
    mixed: Tensor, query_angles: Tensor, _key_angles: Tensor, split_sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """In the place of Transformer Engine's ``fused_qkv_rotary``; self-attention only."""
    return _Rotary.apply(mixed, query_angles, split_sizes[1])
