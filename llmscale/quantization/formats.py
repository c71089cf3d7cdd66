"""How folders hold quantized layers: tensors, and the words of ``config.json``.

compressed-tensors by the package that owns it; GPTQ's own layout is in ``gptq_layout.py``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from torch import Tensor

from llmscale.quantization.gptq_layout import gptq_config, gptq_tensors
from llmscale.quantization.layers import QuantizedLayer, Recipe
from llmscale.quantization.schemes import CacheNumber, Scheme


def stored_tensors(layer: QuantizedLayer, recipe: Recipe) -> dict[str, Tensor]:
    """A layer's tensors, by the names they have beside its bias."""
    grid = layer.grid
    if recipe.layout == "gptq":
        return gptq_tensors(layer.codes_oi, grid, recipe.dtype)
    own = {"weight": layer.weight_oi, "weight_scale": grid.scale_og}
    if grid.zero_og is not None:
        own["weight_zero_point"] = grid.zero_og.to(torch.int8)
    if layer.inputs is not None:
        own["input_scale"] = layer.inputs.scale
        if layer.inputs.zero is not None:
            own["input_zero_point"] = layer.inputs.zero.to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(_format(recipe).value)
    compressed = compressor.compress(own, scheme(recipe))
    return {
        name: (tensor.to(recipe.dtype) if name.endswith("scale") else tensor).contiguous()
        for name, tensor in compressed.items()
    }


def quantization_config(
    recipe: Recipe, blocks: str, layers: list[str], left_out: list[str]
) -> dict[str, Any]:
    """What ``config.json`` says of the quantization.

    Where layers differ, each is named: vLLM joins some of them into one, and would take a class's
    format first.

    Args:
        blocks: the name of the model's row of blocks.
        layers: the names of those that are quantized.
        left_out: the names of other linear layers.
    """
    if recipe.layout == "gptq":
        assert recipe.group_size is not None, "the layout is one of groups"
        return gptq_config(recipe.group_size, blocks)
    alike: dict[Scheme, list[str]] = {}
    for name in layers:
        alike.setdefault(recipe.of(name).scheme, []).append(name)
    groups = {
        f"group_{number}": scheme(recipe.of(names[0]), names if len(alike) > 1 else ("Linear",))
        for number, names in enumerate(alike.values())
    }
    config = QuantizationConfig(
        config_groups=groups,
        format=_format(recipe).value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=left_out,
        kv_cache_scheme=None if recipe.scheme.cache is None else _cache(recipe.scheme.cache),
    )
    return config.model_dump(mode="json")


def scheme(recipe: Recipe, targets: Sequence[str] = ("Linear",)) -> QuantizationScheme:
    """The recipe in the package's words, for layers by their names or classes."""
    weights, activations = recipe.scheme.weights, recipe.scheme.activations
    return QuantizationScheme(
        targets=list(targets),
        weights=QuantizationArgs(
            num_bits=weights.bits,
            type=weights.number,
            symmetric=weights.symmetric,
            strategy=weights.granularity,
            group_size=recipe.group_size,
            actorder="weight" if recipe.scheme.rounding == "gptq" else None,
        ),
        input_activations=None
        if activations is None
        else QuantizationArgs(
            num_bits=8,
            type=activations.number,
            symmetric=activations.symmetric,
            strategy="token" if activations.dynamic else "tensor",
            dynamic=activations.dynamic,
        ),
        format=_format(recipe),
    )


def _cache(number: CacheNumber) -> QuantizationArgs:
    kind = "float" if number == "fp8" else "int"
    return QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy="tensor", dynamic=False)


def _format(recipe: Recipe) -> CompressionFormat:
    if recipe.scheme.weights.number == "float":
        return CompressionFormat.float_quantized
    if recipe.scheme.activations is not None:
        return CompressionFormat.int_quantized
    return CompressionFormat.pack_quantized
