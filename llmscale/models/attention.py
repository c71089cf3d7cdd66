"""The core attention behind megatron-core's layer spec: flash-attn on CUDA, else PyTorch's.

Shape legend: s this rank's queries, t all keys, b batch, n query heads, k key-value heads,
d head size.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional as F

from llmscale.parallel.context import own_places, whole_sequence
from llmscale.parallel.probes import flash_attention

LARGEST_FLASH_HEAD = 256


class CoreAttention(MegatronModule):
    """Attention without the matrix of scores in memory, over a context-parallel group too.

    Keys and values are gathered over the group; queries stay where they are. Queries see the
    keys of their own segment alone: a packed document, or the tokens that are no padding.
    Keys may be of another sequence than queries (cross attention).

    Attributes:
        position_bias: gives what is added to the scores, ``[1, n, s, t]``, for queries' places
            ``[s]`` and the number of keys. It is called here, not before, so that recomputing
            attention computes it anew, with a graph of its own.
    """

    position_bias: Callable[[Tensor, int], Tensor] | None = None

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
        self.causal = attn_mask_type == AttnMaskType.causal
        self.softmax_scale = softmax_scale if softmax_scale is not None else config.softmax_scale

    def forward(
        self,
        query_sbnd: Tensor,
        key_sbkd: Tensor,
        value_sbkd: Tensor,
        segments_bt: Tensor | None = None,
        attention_bias: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Attention of this rank's queries over the whole sequence.

        Args:
            segments_bt: the number of each token's segment, over the whole sequence; where
                queries and keys are of two sequences, ``[2, b, t]``, the queries' first.
            attention_bias: ``[1, n, s, t]``, added to the scores.

        Returns:
            ``[s, b, n * d]``.
        """
        length, batch = query_sbnd.shape[:2]
        group = parallel_state.get_context_parallel_group()
        key, value = (whole_sequence(own, group) for own in (key_sbkd, value_sbkd))
        if self.position_bias is not None:
            places_s = own_places(length * group.size(), group.rank(), group.size())
            attention_bias = self.position_bias(places_s.to(query_sbnd.device), key.shape[0])
        plain = segments_bt is None and attention_bias is None
        flash = flash_attention(query_sbnd.device.type, query_sbnd.dtype)
        if plain and flash is not None and query_sbnd.shape[-1] <= LARGEST_FLASH_HEAD:
            return self._by_pieces(query_sbnd, key, value, group, flash)
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query_sbnd, key, value))
        whole = self.causal and plain and group.size() == 1
        mask = None if whole else self._mask(query, key, segments_bt, attention_bias, group)
        out_bnsd = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=whole,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out_bnsd.permute(2, 0, 1, 3).reshape(length, batch, -1)

    def _mask(
        self,
        query: Tensor,
        key: Tensor,
        segments: Tensor | None,
        bias: Tensor | None,
        group: Any,
    ) -> Tensor | None:
        """What may be seen, ``[b or 1, 1, s, t]``, or what is added to the scores."""
        queries, keys = query.shape[2] * group.size(), key.shape[2]
        places_s = own_places(queries, group.rank(), group.size()).to(query.device)
        seen = None
        if self.causal:
            seen = places_s[:, None] >= torch.arange(keys, device=query.device)
            seen = seen[None, None]
        if segments is not None:
            of_queries, of_keys = segments if segments.dim() == 3 else (segments, segments)
            same = of_queries[:, places_s, None] == of_keys[:, None, :keys]
            seen = same[:, None] if seen is None else seen & same[:, None]
        if bias is None or seen is None:
            return seen if bias is None else bias
        return bias.masked_fill(~seen, torch.finfo(bias.dtype).min)

    def _by_pieces(
        self, query: Tensor, key: Tensor, value: Tensor, group: Any, flash: str
    ) -> Tensor:
        """flash-attn over each contiguous piece of queries and the keys up to its end."""
        attend = importlib.import_module(flash).flash_attn_func
        length, batch = query.shape[:2]
        pieces = query.chunk(2) if group.size() > 1 else (query,)
        places = own_places(length * group.size(), group.rank(), group.size()).chunk(len(pieces))
        outs = []
        for piece, place in zip(pieces, places, strict=True):
            end = int(place[-1]) + 1 if self.causal else key.shape[0]
            three = (t.transpose(0, 1) for t in (piece, key[:end], value[:end]))
            # A causal mask of flash-attn is aligned to the last query and the last key.
            out = attend(*three, softmax_scale=self.softmax_scale, causal=self.causal)
            out = out[0] if isinstance(out, tuple) else out  # early releases of version 3
            outs.append(out.transpose(0, 1))
        return torch.cat(outs).reshape(length, batch, -1)
