"""Where the scales of a layer's inputs can go: into what computes them, by family.

Shape legend: i the columns of the layer behind.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SCALED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Families with the layers named below, whose norms multiply by their weight."""

VALUES = "self_attn.v_proj"
BEFORE = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.o_proj": VALUES,
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}
"""By the first of the layers that share an input: what gives it."""


def shares(leader: str, config: Any, columns: int) -> Tensor | None:
    """Which output of what comes before each column [i] is; None where there is nothing known."""
    if config.model_type not in SCALED_FAMILIES or leader not in BEFORE:
        return None
    places_i = torch.arange(columns)
    if leader != "self_attn.o_proj":
        return places_i
    size = columns // config.num_attention_heads
    repeats = config.num_attention_heads // config.num_key_value_heads
    return places_i // size // repeats * size + places_i % size


def by_output(scales_i: Tensor, shares_i: Tensor) -> Tensor:
    """The scales of columns as those of the outputs of what comes before."""
    return torch.ones(int(shares_i.max()) + 1).index_copy_(0, shares_i, scales_i)


def divided_outputs(
    tensors: Mapping[str, Tensor], leader: str, scales: Tensor
) -> dict[str, Tensor]:
    """The weights of what comes before, with its outputs divided by a scale each.

    Args:
        tensors: the block's, by name.
    """
    before = BEFORE[leader]
    names = [name for name in (f"{before}.weight", f"{before}.bias") if name in tensors]
    return {
        name: tensors[name] / (scales[:, None] if tensors[name].ndim == 2 else scales)
        for name in names
    }
