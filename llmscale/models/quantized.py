"""Hugging Face folders whose weights are quantized, and what it takes to load them."""

from pathlib import Path
from typing import Any

from llmscale.artifacts import read_json
from llmscale.packages import require_package

PACKAGES = {
    "compressed-tensors": ("quantization", ["compressed_tensors"]),
    "bitsandbytes": ("quantization", ["bitsandbytes", "accelerate"]),
    "gptq": ("gptq", ["optimum", "gptqmodel"]),
}
"""By the method that a ``config.json`` names: what transformers loads its weights with, and the
extra that brings it."""


def require_packages_of(folder: Path) -> None:
    """Sees to it that the packages which a folder's weights are stored by are there.

    Raises:
        MachineError: names the command that installs what is missing.
        ValueError: if ``config.json`` is no JSON.
    """
    config: Any = read_json(folder / "config.json") or {}
    method = (config.get("quantization_config") or {}).get("quant_method")
    extra, packages = PACKAGES.get(str(method), ("", []))
    for package in packages:
        require_package(str(folder), package, extra)
