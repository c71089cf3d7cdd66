"""The tensors of a Hugging Face folder, read one at a time."""

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class HuggingFaceWeights:
    """The tensors of a Hugging Face folder by name, read one at a time.

    Raises:
        FileNotFoundError: if the folder holds no safetensors.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / INDEX
        if index.exists():
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif (folder / SINGLE).exists():
            with safe_open(folder / SINGLE, framework="pt") as file:
                files = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise FileNotFoundError(f"{folder}: no {SINGLE} and no {INDEX}")
        self._files = {name: folder / file for name, file in files.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files:
            name = _former_name(name)
        if name not in self._files and name == "lm_head.weight":
            name = "shared.weight"  # T5 of version 1.1 whose tables are equal
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)


def _former_name(name: str) -> str:
    """What GPT-2's and BERT's own first folders call a tensor."""
    name = name.removeprefix("transformer.")
    norms = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for now, then in norms.items():
        name = name.replace(now, then)
    return name
