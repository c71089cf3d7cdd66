"""How large a quantized folder is."""

from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from llmscale.quantization.blocks import BlockwiseModel

BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8}
BITS |= {"I8": 8, "U8": 8, "BOOL": 8}


def folder_sizes(folder: Path, model: BlockwiseModel) -> dict[str, Any]:
    """Megabytes of all tensors, and bits a weight of the blocks' linear layers, all parts counted.

    Args:
        model: the one that was quantized, whose layers' sizes count.
    """
    layers = {name: model.model.get_parameter(f"{name}.weight").numel() for name in model.layers()}
    total = of_layers = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                piece = tensors.get_slice(name)
                bits = prod(piece.get_shape()) * BITS[piece.get_dtype()]
                total += bits
                before, weight, _ = name.partition(".weight")
                owner = before if weight else name.rpartition(".")[0]
                if owner in layers and not name.endswith(".bias"):
                    of_layers += bits
    return {
        "megabytes": round(total / 8e6, 2),
        "bits_per_weight": round(of_layers / sum(layers.values()), 3) if layers else None,
    }
