"""What this machine's CUDA packages and GPUs offer, found by looking; a CPU has none of it.

docs/gpu.md lists what each choice needs.
"""

import importlib.util

import torch

from llmscale.errors import MachineError

AMPERE, ADA, HOPPER, BLACKWELL, DESKTOP_BLACKWELL = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
"""Compute capabilities from which on a generation's features are there."""


def _capable(device: str, capability: tuple[int, int]) -> bool:
    return device == "cuda" and torch.cuda.get_device_capability() >= capability


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def flash_attention(device: str, dtype: torch.dtype) -> str | None:
    """The flash-attn module that serves this device and precision, if one is here.

    Version 3 (``flash_attn_interface``) is for Hopper alone.
    """
    if dtype not in (torch.float16, torch.bfloat16) or not _capable(device, AMPERE):
        return None
    hopper = _capable(device, HOPPER) and not _capable(device, BLACKWELL)
    if hopper and _installed("flash_attn_interface"):
        return "flash_attn_interface"
    return "flash_attn" if _installed("flash_attn") else None


def transformer_engine(device: str) -> bool:
    """Whether Transformer Engine's layers can serve this device."""
    return _installed("transformer_engine") and _capable(device, AMPERE)


def fp8_recipe(device: str) -> str | None:
    """How Transformer Engine is to scale matrix products in 8 bits, if it can.

    Data-centre Blackwell scales blocks of 32 numbers in hardware (MXFP8); elsewhere, whole
    tensors are scaled by the largest numbers of former steps (Micikevicius et al. 2022, section 4).
    """
    if not transformer_engine(device) or not _capable(device, ADA):
        return None
    blocks = _capable(device, BLACKWELL) and not _capable(device, DESKTOP_BLACKWELL)
    return "mxfp8" if blocks else "delayed"


def gradient_accumulation_kernel() -> bool:
    """Whether Apex's kernel that adds weight gradients in place is installed."""
    return _installed("fused_weight_gradient_mlp_cuda")


def overlapped_gradient_reduction(device: str) -> bool:
    """Whether gradients are summed over data ranks while the backward pass goes on."""
    return device == "cuda"


def quick_bf16() -> bool:
    """Whether this CPU has instructions that multiply in bf16, twice as fast as in fp32.

    Releases of torch that cannot tell count as a CPU without.
    """
    told = getattr(torch.cpu, "get_capabilities", dict)
    capabilities: dict[str, object] = told()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def require_precision(precision: str, device: str) -> None:
    """Checks that the device can train in a recipe's precision.

    Raises:
        MachineError: if it cannot.
    """
    if precision == "fp8" and fp8_recipe(device) is None:
        raise MachineError(
            "precision fp8 needs Transformer Engine and a GPU of compute capability 8.9 or newer, "
            "which this machine lacks; set precision: bf16"
        )
