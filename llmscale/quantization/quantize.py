"""From a model's folder, a scheme and texts to a folder with quantized weights."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import llmscale.quiet  # noqa: F401
from llmscale.data.tokenizer import load_tokenizer
from llmscale.errors import RecipeError
from llmscale.packages import require_package
from llmscale.parallel import shares
from llmscale.quantization.blocks import BlockwiseModel
from llmscale.quantization.calibration import calibration_windows
from llmscale.quantization.gptq_layout import OUTPUTS
from llmscale.quantization.key_value_cache import CACHED_FAMILIES
from llmscale.quantization.rotation import rotate
from llmscale.quantization.schemes import Quantization, Scheme, fitting_group_size
from llmscale.quantization.sizes import folder_sizes

CALIBRATION_TOKENS = 32768
PACKAGES = ("compressed_tensors", "greenlet")
LOADED_BY = {
    "compressed-tensors": "Transformers, vLLM",
    "gptq": "Transformers with optimum and gptqmodel, GPTQModel, vLLM",
}


@dataclass
class Listener:
    """Who is told how far the work is, and what was chosen."""

    on_block: Callable[[int, int], None] = lambda done, blocks: None
    say: Callable[[str], None] = field(default=lambda line: None)


def quantize(
    source: Path,
    target: Path,
    settings: Quantization,
    texts: Iterable[str] | None = None,
    *,
    where: str = "calibration",
    tokens: int = CALIBRATION_TOKENS,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Writes ``target``; run again after a kill, it goes on.

    Args:
        texts: to calibrate with, where the scheme does.
        where: what names them in an error.

    Returns:
        What was made: sizes, seconds, group size.

    Raises:
        RecipeError: if the model, the texts or a setting do not fit.
        MachineError: if a package is missing.
    """
    listener = listener or Listener()
    scheme, begun = settings.composition(), time.monotonic()
    for key, wrong in settings.misplaced():
        raise RecipeError(f"{key}: {wrong}")
    _require_packages(settings.scheme, scheme)
    model = BlockwiseModel(source)
    dtype = torch.float16 if model.dtype == torch.float16 else torch.bfloat16
    if scheme.library_type is not None:
        from llmscale.quantization.bitsandbytes_folder import write_bitsandbytes_folder

        model.require_finite()
        write_bitsandbytes_folder(source, target, scheme.library_type, dtype)
        return _figures(settings, model, target, begun, {})
    # These import the packages that were just asked for.
    from llmscale.quantization.engine import quantize_folder
    from llmscale.quantization.layers import LARGEST_NOISE, Recipe
    from llmscale.quantization.mixed import require_budget

    _require_fitting(model, settings)
    if scheme.rotated:
        rotate(model)
    more: dict[str, Any] = {}
    group_size, why = None, ""
    if scheme.grouped:
        columns = [model.blocks[0].get_parameter(f"{name}.weight").shape[1] for name in model.names]
        group_size, why = fitting_group_size(settings.group_size, columns)
        more["group_size"] = group_size
    recipe = Recipe(scheme, group_size, dtype, settings.budget, layout=settings.layout)
    if recipe.bits is not None:
        require_budget(model, recipe)
    windows = None
    if scheme.calibrated:
        if texts is None:
            raise RecipeError(f"{where}: {settings.calibrates} is calibrated with texts; give some")
        longest = model.config.max_position_embeddings
        windows = calibration_windows(texts, load_tokenizer(source), tokens, longest, where)
        if len(windows) < shares.place()[1]:
            raise RecipeError(
                f"ranks: {shares.place()[1]} are more than the {len(windows)} windows of "
                f"{windows.shape[1]:,} tokens that the calibration has; use {len(windows)}"
            )
        more["calibration_tokens"] = windows.numel()
        if windows.numel() < tokens // windows.shape[1] * windows.shape[1]:
            listener.say(f"{where}: holds {windows.numel():,} tokens of the {tokens:,} wanted")
    if why:
        listener.say(why)
    by_token = quantize_folder(model, target, recipe, windows, listener.on_block).by_token
    if by_token:
        more["layers_by_token"] = len(by_token)
        listener.say(
            f"{settings.scheme}: {len(by_token)} of {len(model.layers())} layers have a scale a "
            f"token for their inputs: one a layer adds more than {LARGEST_NOISE:g} of "
            "their outputs' mean square"
        )
    return _figures(settings, model, target, begun, more)


def _require_packages(name: str, scheme: Scheme) -> None:
    own = ("bitsandbytes", "accelerate") if scheme.library_type else PACKAGES
    for package in own:
        require_package(name, package, "quantization")


def _require_fitting(model: BlockwiseModel, settings: Quantization) -> None:
    """Checks that the model has what the settings are about."""
    model.require_linear_layers()
    kind = model.config.model_type
    if settings.key_value_cache is not None and kind not in CACHED_FAMILIES:
        raise RecipeError(
            f"key_value_cache: {model.folder}: the attention of {kind} is not known, only that of "
            f"{', '.join(CACHED_FAMILIES)}; remove it"
        )
    for name in model.names if settings.layout == "gptq" else ():
        layer = model.blocks[0].get_submodule(name)
        # A family's own kind of layer is not replaced where GPTQ's layout is loaded.
        if type(layer) is not torch.nn.Linear or layer.out_features % OUTPUTS:
            raise RecipeError(
                f"layout: gptq is read for layers of the class Linear with a multiple of {OUTPUTS} "
                f"outputs, and {name} of {model.folder} is {layer}; remove it"
            )


def _figures(
    settings: Quantization,
    model: BlockwiseModel,
    target: Path,
    begun: float,
    more: dict[str, Any],
) -> dict[str, Any]:
    return {
        "scheme": settings.scheme,
        **more,
        **folder_sizes(target, model),
        "loaded_by": LOADED_BY[settings.layout],
        "quantize_seconds": round(time.monotonic() - begun, 2),
    }
