"""The core attention behind megatron-core's layer spec: flash-attn on CUDA, else PyTorch's.

Shape legend: s sequence, b batch, n query heads, k key-value heads, d head size.
"""

import importlib.util
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional as F


def flash_attention_available(device: str, dtype: torch.dtype) -> bool:
    """Whether the flash-attn package is here and serves this device and precision."""
    return (
        device == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and importlib.util.find_spec("flash_attn") is not None
        and torch.cuda.get_device_capability() >= (8, 0)
    )


class CausalAttention(MegatronModule):
    """Causal attention without the matrix of scores in memory."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        *_: Any,
        softmax_scale: float | None = None,
        **__: Any,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(f"CausalAttention cannot serve mask {attn_mask_type}")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_sbnd: Tensor,
        key_sbkd: Tensor,
        value_sbkd: Tensor,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Attention of every position over itself and those before it.

        Returns:
            ``[s, b, n * d]``.
        """
        length, batch = query_sbnd.shape[:2]
        if flash_attention_available(query_sbnd.device.type, query_sbnd.dtype):
            from flash_attn import flash_attn_func

            query, key, value = (t.transpose(0, 1) for t in (query_sbnd, key_sbkd, value_sbkd))
            out_bsnd = flash_attn_func(
                query, key, value, softmax_scale=self.softmax_scale, causal=True
            )
            return out_bsnd.transpose(0, 1).reshape(length, batch, -1)
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query_sbnd, key_sbkd, value_sbkd))
        out_bnsd = F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out_bnsd.permute(2, 0, 1, 3).reshape(length, batch, -1)


def transformer_engine_available(device: str) -> bool:
    """Whether Transformer Engine's layers can serve this device."""
    return (
        device == "cuda"
        and importlib.util.find_spec("transformer_engine") is not None
        and torch.cuda.get_device_capability() >= (8, 0)
    )
