"""Quantizing one block, its layers in the order in which they compute.

Shape legend: s positions, d hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmscale.errors import RecipeError
from llmscale.parallel import probes
from llmscale.parallel.memory import give_back_freed_memory
from llmscale.quantization.families import BEFORE, VALUES, by_output, divided_outputs, shares
from llmscale.quantization.formats import stored_tensors
from llmscale.quantization.gptq import NotPositiveDefinite
from llmscale.quantization.grids import stored_scale
from llmscale.quantization.inputs import InputStatistics
from llmscale.quantization.key_value_cache import SeenCache
from llmscale.quantization.layers import QuantizedGroup, QuantizedLayer, Recipe, quantize_layers
from llmscale.quantization.paused import PausedPass, pause

PASSES_A_TRIM = 4
"""Passes after which freed memory is given back: all of them would free as much as they hold."""


def layers_by_input(
    block: nn.Module, names: Sequence[str], inputs: Tensor, told: Mapping[str, Any]
) -> list[list[str]]:
    """The names of linear layers in the order they run, those with one input together."""
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str, given: Tensor) -> None:
        for other, together in seen:
            if other is given:
                together.append(name)
                return
        seen.append((given, [name]))

    hooks = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: note(name, given[0])
        )
        for name in names
    ]
    try:
        with torch.no_grad():
            block(inputs, **told)
    finally:
        for hook in hooks:
            hook.remove()
    return [together for _, together in seen]


@torch.no_grad()
def quantize_block(
    block: nn.Module,
    groups: Sequence[Sequence[str]],
    recipe: Recipe,
    inputs: Sequence[Tensor],
    told: Mapping[str, Any],
    config: Any,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Quantizes a block by its inputs [1, s, d], a window each, in one forward pass.

    Layers with one input are of one format; the recipe knows them by their names in the block.

    Every window's pass waits before each group of layers until they are quantized, so that the
    next layers see what these compute in the end ("true sequential"). Ranks that share the windows
    quantize alike, by what all of them have seen; collective.

    Returns:
        The block's tensors as they are stored, and what the quantized block computes.

    Raises:
        RecipeError: if a layer's inputs are of no use.
    """
    cache = SeenCache()
    if recipe.scheme.cache is not None:
        told = {**told, "past_key_values": cache}
    passes = [PausedPass(partial(block, given, **told)) for given in inputs]
    leaders = {group[0] for group in groups}
    hooks = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, given: pause(given[0]))
        for name in leaders
    ]
    done: dict[str, QuantizedLayer] = {}
    changed: dict[str, Tensor] = {}
    before = block.state_dict()
    try:
        for group in groups:
            weights = {name: _weight(block, name) for name in group}
            columns = weights[group[0]].shape[1]
            own = recipe.of(group[0])
            statistics = InputStatistics(columns, own.scheme.by_products, own.scheme.by_range)
            for given in _all_going_on(passes):
                statistics.add(given)
            statistics.join()
            if not statistics.finite:
                raise _unusable(group[0])
            shares_i = shares(group[0], config, columns)
            try:
                quantized = quantize_layers(weights, own, statistics, shares_i)
            except NotPositiveDefinite:
                raise _unusable(group[0]) from None
            if quantized.scales_i is not None and shares_i is not None:
                scales = _divide(before, changed, done, recipe, group[0], quantized, shares_i)
                if BEFORE[group[0]] == VALUES:
                    cache.values_c = cache.values_c / scales
            for name in group:
                _weight(block, name).data = quantized.effective(name)
            done |= quantized.layers
            give_back_freed_memory()
        for _ in _all_going_on(passes):
            pass
        outputs = [one.result[0] if isinstance(one.result, tuple) else one.result for one in passes]
    finally:
        for hook in hooks:
            hook.remove()
        for one in passes:
            one.close()
    tensors = _stored({**before, **changed}, done, recipe)
    if recipe.scheme.cache is not None:
        tensors |= cache.scales(recipe.scheme.cache, recipe.dtype)
    return tensors, outputs


@torch.no_grad()
def round_block(block: nn.Module, names: Sequence[str], recipe: Recipe) -> dict[str, Tensor]:
    """Quantizes a block without calibration; gives its tensors as they are stored."""
    done: dict[str, QuantizedLayer] = {}
    for name in names:
        done |= quantize_layers({name: _weight(block, name)}, recipe).layers
    return _stored(block.state_dict(), done, recipe)


def _unusable(layer: str) -> RecipeError:
    return RecipeError(
        f"the inputs of {layer} are not finite, or so alike that GPTQ cannot use them; give other "
        "texts to calibrate"
    )


def _all_going_on(passes: Sequence[PausedPass]) -> Iterator[Any]:
    """What each pass gives to its next pause, in bf16 where the CPU multiplies in it."""
    for number, one in enumerate(passes, start=1):
        with torch.autocast("cpu", torch.bfloat16, enabled=probes.quick_bf16()):
            given = one.go_on()
        yield given
        if number % PASSES_A_TRIM == 0:
            give_back_freed_memory()
    give_back_freed_memory()


def _weight(block: nn.Module, name: str) -> Tensor:
    return block.get_parameter(f"{name}.weight")


def _divide(
    tensors: Mapping[str, Tensor],
    changed: dict[str, Tensor],
    done: dict[str, QuantizedLayer],
    recipe: Recipe,
    leader: str,
    quantized: QuantizedGroup,
    shares_i: Tensor,
) -> Tensor:
    """Moves a group's scales to what comes before it, whose rows are divided by those returned."""
    assert quantized.scales_i is not None
    source, scales = BEFORE[leader], by_output(quantized.scales_i, shares_i)
    if source in done:
        layer = done[source]
        scale_og = stored_scale(layer.grid.scale_og / scales[:, None], recipe.dtype)
        done[source] = replace(layer, grid=replace(layer.grid, scale_og=scale_og))
        tensors = {name: tensor for name, tensor in tensors.items() if name != f"{source}.weight"}
    changed |= divided_outputs(tensors, leader, scales)
    return scales


def _stored(
    tensors: Mapping[str, Tensor], done: Mapping[str, QuantizedLayer], recipe: Recipe
) -> dict[str, Tensor]:
    kept = {
        name: tensor.to(recipe.dtype)
        for name, tensor in tensors.items()
        if name.removesuffix(".weight") not in done
    }
    for name, layer in done.items():
        own = recipe.of(name)
        if own.scheme.fixed_inputs and layer.inputs is None:
            own = own.dynamic
        parts = stored_tensors(layer, own)
        kept |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return kept
