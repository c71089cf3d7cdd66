"""How far rounding a layer moves what a model says, by the Fisher information of its outputs.

To second order, the Kullback-Leibler divergence of the next tokens' distribution from the model's
own is half the expectation of (g . change)^2, with g the gradient of the negative log-likelihood
of tokens drawn from the model and ``change`` that of a layer's outputs. FIT (Zandonati et al. 2022)
estimates the same by the trace over weights; here every token has its own gradient and its own
change, and tokens are taken apart.

Shape legend: s positions, d hidden size, n tokens, o outputs, i inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmscale.parallel.memory import give_back_freed_memory
from llmscale.quantization.blocks import BlockwiseModel

PASSES = 2
WINDOWS = 4
"""Of the calibration, at most: gradients cost more than a forward pass."""

Changes = Mapping[str, tuple[Tensor, Tensor]]
"""By a layer's name: what is added to its weights [o, i] in each of two formats."""


def divergences(
    model: BlockwiseModel,
    windows_ns: Tensor,
    changes_of: Callable[[nn.Module], Changes],
    scratch: Path,
    on_pass: Callable[[int], None] = lambda passed: None,
) -> dict[str, tuple[float, float]]:
    """By a layer's full name: the divergence that each of its changes alone makes, nats a token.

    Goes through the blocks forward and back with one of them in memory; what goes into each waits
    in ``scratch``.

    Args:
        changes_of: gives a loaded block's changes, by the layers' names within it.
        on_pass: is told how many blocks were gone through, both ways counted.
    """
    some_ns = windows_ns[:: max(1, len(windows_ns) // WINDOWS)][:WINDOWS]
    hidden, told = model.first_inputs(some_ns)
    count = len(model.blocks)
    kept = [scratch / f"sensitivity-{number:05d}.safetensors" for number in range(count)]
    for number in range(count):
        save_file({"inputs": torch.cat(hidden)}, kept[number])
        with model.loaded(number) as block, torch.no_grad():
            hidden = [_first(block(one, **told[number])) for one in hidden]
        give_back_freed_memory()
        on_pass(number + 1)
    gradients = model.last_gradients(some_ns, hidden)
    found: dict[str, tuple[float, float]] = {}
    tokens = some_ns.numel()
    for number in reversed(range(count)):
        inputs = load_file(kept[number])["inputs"].split(1)
        with model.loaded(number) as block:
            own, gradients = block_divergences(
                block, changes_of(block), inputs, gradients, told[number]
            )
        found |= {
            f"{model.prefix}.{number}.{name}": (one / tokens, other / tokens)
            for name, (one, other) in own.items()
        }
        kept[number].unlink()
        give_back_freed_memory()
        on_pass(2 * count - number)
    return found


def block_divergences(
    block: nn.Module,
    changes: Changes,
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    told: Mapping[str, Any],
) -> tuple[dict[str, tuple[float, float]], list[Tensor]]:
    """Divergences summed over tokens, and the gradients by the block's inputs.

    Args:
        inputs: [1, s, d], a window each.
        gradients: by the block's outputs, likewise.
    """
    found = dict.fromkeys(changes, (0.0, 0.0))

    def add(name: str, inputs_ni: Tensor, gradient_no: Tensor) -> None:
        one, other = (_moved(inputs_ni, change_oi, gradient_no) for change_oi in changes[name])
        found[name] = found[name][0] + one, found[name][1] + other

    def note(name: str, _: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(partial(add, name, given[0].detach()))

    hooks = [
        block.get_submodule(name).register_forward_hook(partial(note, name)) for name in changes
    ]
    before: list[Tensor] = []
    try:
        for one, gradient in zip(inputs, gradients, strict=True):
            leaf = one.detach().requires_grad_()
            before += torch.autograd.grad(_first(block(leaf, **told)), leaf, gradient)
    finally:
        for hook in hooks:
            hook.remove()
    return found, before


def _moved(inputs_ni: Tensor, change_oi: Tensor, gradient_no: Tensor) -> float:
    moved_n = (gradient_no * (inputs_ni @ change_oi.T)).sum(-1)
    return float(moved_n.square().sum()) / 2


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
