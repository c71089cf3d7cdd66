"""Which layers get more bits, where a budget lets only some have them.

Shape legend: n windows, s tokens in one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from llmscale.errors import RecipeError
from llmscale.quantization.block import layers_by_input
from llmscale.quantization.blocks import BlockwiseModel
from llmscale.quantization.grids import find_grid
from llmscale.quantization.layers import Recipe
from llmscale.quantization.sensitivity import Changes, divergences

Pair = tuple[float, float]

SHAPE_BITS = 128
"""A packed layer has its two sizes beside it."""


@dataclass(frozen=True)
class Choice:
    """Layers that get one of two formats: what they take and make in the narrow one, and the wide.

    ``bits`` are those of all their weights, ``divergences`` nats a token.
    """

    names: tuple[str, ...]
    bits: Pair
    divergences: Pair

    @property
    def worth(self) -> float:
        """The divergence that is taken away by a bit more."""
        more = self.bits[1] - self.bits[0]
        return (self.divergences[0] - self.divergences[1]) / more


def widened(choices: Sequence[Choice], budget: float) -> list[str]:
    """The layers to be stored in the wide format, those first whose bits are worth most.

    Args:
        budget: bits of all layers together.
    """
    left = budget - sum(choice.bits[0] for choice in choices)
    names: list[str] = []
    for choice in sorted(choices, key=lambda choice: -choice.worth):
        more = choice.bits[1] - choice.bits[0]
        if more <= left:
            left -= more
            names += choice.names
    return names


def require_budget(model: BlockwiseModel, recipe: Recipe) -> None:
    """Checks that the recipe's bits a weight suffice for its narrow format.

    Raises:
        RecipeError: if they do not.
    """
    assert recipe.bits is not None
    bits, weights = _bits(model, recipe), _weights(model)
    least = sum(narrow for narrow, _ in bits.values()) / weights
    if recipe.bits < least:
        raise RecipeError(
            f"bits: {recipe.bits:g} a weight are fewer than the {least:.4g} of 4 bits in groups of "
            f"{recipe.group_size}; use {least + 0.05:.1f} to 8"
        )


def wide_layers(
    model: BlockwiseModel,
    recipe: Recipe,
    windows_ns: Tensor,
    scratch: Path,
    on_pass: Callable[[int], None] = lambda passed: None,
) -> list[str]:
    """The full names of layers in the recipe's wider format, within its bits a weight.

    Layers that share an input have one format: engines that join them could not load them else.
    """
    assert recipe.bits is not None
    bits = _bits(model, recipe)
    found = divergences(model, windows_ns, partial(_changes, model.names, recipe), scratch, on_pass)
    hidden, told = model.first_inputs(windows_ns[:1])
    with model.loaded(0) as block:
        groups = layers_by_input(block, model.names, hidden[0], told[0])
    choices = []
    for number in range(len(model.blocks)):
        for group in groups:
            names = tuple(f"{model.prefix}.{number}.{name}" for name in group)
            choices.append(Choice(names, _summed(bits, names), _summed(found, names)))
    return widened(choices, recipe.bits * _weights(model))


def _changes(names: Sequence[str], recipe: Recipe, block: nn.Module) -> Changes:
    """What rounding to nearest adds to weights in the narrow format, and in the wide one."""
    assert recipe.scheme.wider is not None
    changes = {}
    for name in names:
        weight_oi = block.get_parameter(f"{name}.weight")
        narrow = find_grid(weight_oi, recipe.scheme.weights, recipe.group_size, recipe.dtype)
        wide = find_grid(weight_oi, recipe.scheme.wider, None, recipe.dtype)
        changes[name] = narrow.rounded(weight_oi) - weight_oi, wide.rounded(weight_oi) - weight_oi
    return changes


def _bits(model: BlockwiseModel, recipe: Recipe) -> dict[str, Pair]:
    """By a layer's full name: the bits it takes in the narrow format, and in the wide one."""
    narrow, wide = recipe.scheme.weights, recipe.scheme.wider
    assert wide is not None
    found = {}
    for name in model.layers():
        rows, columns = model.model.get_parameter(f"{name}.weight").shape
        each = [form.stored_bits(columns, recipe.group_size) for form in (narrow, wide)]
        found[name] = (
            each[0] * rows * columns + SHAPE_BITS,
            each[1] * rows * columns + SHAPE_BITS,
        )
    return found


def _weights(model: BlockwiseModel) -> int:
    return sum(model.model.get_parameter(f"{name}.weight").numel() for name in model.layers())


def _summed(pairs: Mapping[str, Pair], names: Sequence[str]) -> Pair:
    return sum(pairs[name][0] for name in names), sum(pairs[name][1] for name in names)
