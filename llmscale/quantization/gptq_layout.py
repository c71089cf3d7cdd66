"""GPTQ's own layout of 4-bit weights, as AutoGPTQ began it and GPTQModel, vLLM and others read it.

The checkpoint format ``gptq`` (GPTQModel's quantization/config.py): ``qweight`` holds eight inputs
a number, the first in the lowest bits, ``qzeros`` eight outputs, each less one. Codes are without
sign: 8 stands for zero.

Shape legend: o outputs (rows), i inputs (columns), g groups of columns in a row.
"""

from typing import Any

import torch
from torch import Tensor

from llmscale.quantization.grids import Grid

BITS = 4
PACKED = 32 // BITS
ZERO = 8
OUTPUTS = 32
"""GPTQModel's kernels take so many outputs at a time."""


def gptq_tensors(codes_oi: Tensor, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
    """A layer's tensors, by the names they have beside its bias; sizes are multiples of eight."""
    columns, groups = codes_oi.shape[1], grid.scale_og.shape[1]
    zero_go = torch.full((groups, len(codes_oi)), ZERO - 1)
    return {
        "qweight": _packed(codes_oi.T.long() + ZERO),
        "qzeros": _packed(zero_go.T).T.contiguous(),
        "scales": grid.scale_og.T.to(dtype).contiguous(),
        "g_idx": (torch.arange(columns) // (columns // groups)).int(),
    }


def gptq_config(group_size: int, blocks: str) -> dict[str, Any]:
    """What ``config.json`` says of the quantization.

    No order of columns is stored, whatever the order in which they were rounded (``desc_act``).

    Args:
        blocks: the name of the model's row of blocks.
    """
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": BITS,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "block_name_to_quantize": blocks,
    }


def _packed(codes: Tensor) -> Tensor:
    """Rows eight at a time in 32 bits [rows / 8, columns]."""
    shifts = torch.arange(0, 32, BITS)[:, None]
    together = (codes.unflatten(0, (-1, PACKED)) << shifts).sum(1)
    return together.to(torch.int32)
