"""Low-rank adapters (Hu et al. 2021, LoRA) on a model of transformers, by PEFT."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmscale.errors import RecipeError
from llmscale.models.weights import low_rank_start
from llmscale.training.settings import Adapter, no_such_target

NAME = "default"
"""PEFT's, of the one adapter a model has here."""
Gathering = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]
"""Makes parameters whole that an engine has split."""


def with_adapter(model: nn.Module, adapter: Adapter, seed: int) -> nn.Module:
    """The model frozen, with an adapter to train; the same for the same seed.

    A layer's A and B are those that the Megatron engine begins with.

    Raises:
        RecipeError: if the model lacks a linear layer that ``targets`` names.
    """
    targets = "all-linear" if adapter.targets is None else list(adapter.targets)
    known = _linear_layers(model)
    for target in adapter.targets or ():
        if target not in known:
            raise RecipeError(no_such_target(target, known))
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=targets,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    adapted: nn.Module = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if ".lora_A." in name:
            own = low_rank_start(_saved_name(name), tuple(parameter.shape), seed)
            parameter.data.copy_(own)
    return adapted


def _saved_name(name: str) -> str:
    """A parameter's name in a PEFT folder."""
    return name.replace(f".{NAME}", "")


def _linear_layers(model: Any) -> list[str]:
    """The last names of the linear layers, but of the output layer, which may be tied."""
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear | Conv1D) and layer is not head
        }
    )


def is_adapted(model: nn.Module) -> bool:
    """Whether ``with_adapter`` made the model."""
    return isinstance(model, peft.PeftModel)


@torch.no_grad()
def merged_weights(model: nn.Module, gathered: Gathering) -> Iterator[tuple[str, Tensor]]:
    """The weights of the model below, the adapter added to them, one at a time; collective.

    A layer's is W + alpha / rank x B A (Hu et al. 2021, section 4.1).
    """
    below = model.get_base_model()  # type: ignore[operator]
    layers = {
        f"{name}.base_layer.weight": layer
        for name, layer in below.named_modules()
        if isinstance(layer, LoraLayer)
    }
    for name, parameter in below.named_parameters():
        if ".lora_" in name:
            continue
        layer = layers.get(name)
        parts = [parameter]
        if layer is not None:
            parts += [layer.lora_A[NAME].weight, layer.lora_B[NAME].weight]
        with gathered(parts):
            whole = parameter.detach()
            if layer is not None:
                whole = whole + layer.get_delta_weight(NAME)
            yield name.replace(".base_layer", ""), whole


@torch.no_grad()
def adapter_weights(model: nn.Module, gathered: Gathering) -> Iterator[tuple[str, Tensor]]:
    """The adapter's weights under the names that a PEFT folder has; collective."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            with gathered([parameter]):
                yield _saved_name(name), parameter.detach()


def save_adapter(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Writes a PEFT folder."""
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config[NAME]
    config.inference_mode = True
    config.save_pretrained(folder)
