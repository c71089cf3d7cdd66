"""Adapters on a model of transformers, by PEFT: made, started, merged, saved."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from llmscale.errors import RecipeError
from llmscale.models.weights import initial_tensor, low_rank_start, named_generator
from llmscale.training.settings import Adapter, Precision, no_such_target

NAME = "default"
"""PEFT's, of the one adapter a model has here."""
VIRTUAL_TOKENS = f"prompt_encoder.{NAME}.embedding.weight"
SAVED_VIRTUAL_TOKENS = "prompt_embeddings"
Gathering = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]
"""Makes parameters whole that an engine has split."""


def quantization(adapter: Adapter | None, precision: Precision, device: str) -> dict[str, Any]:
    """How transformers is to load the weights beneath: in four bits, or as they are.

    NF4, its scales quantized again (Dettmers et al. 2023, section 3), by bitsandbytes.
    """
    if adapter is None or not adapter.quantized:
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def with_adapter(model: nn.Module, adapter: Adapter, seed: int) -> nn.Module:
    """The model frozen, with an adapter to train; the same for the same seed.

    A layer's A and B are those that the Megatron engine begins with.

    Raises:
        RecipeError: if the model lacks a linear layer that ``targets`` names.
    """
    keep_four_bits_as_stored(model)
    adapted: nn.Module = peft.get_peft_model(model, _config(model, adapter))
    for name, parameter in adapted.named_parameters():
        if ".lora_A." in name:
            own = low_rank_start(_saved_name(name), tuple(parameter.shape), seed)
            parameter.data.copy_(own)
        elif name == VIRTUAL_TOKENS:
            parameter.data.copy_(_first_virtual_tokens(model, adapter, parameter, seed))
    return adapted


def _config(model: nn.Module, adapter: Adapter) -> peft.PeftConfig:
    match adapter.method:
        case "ia3":
            return peft.IA3Config(task_type="CAUSAL_LM")
        case "prefix":
            return peft.PrefixTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=adapter.virtual_tokens
            )
        case "prompt":
            return peft.PromptTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=adapter.virtual_tokens
            )
    known = _linear_layers(model)
    for target in adapter.targets or ():
        if target not in known:
            raise RecipeError(no_such_target(target, known))
    return peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules="all-linear" if adapter.targets is None else list(adapter.targets),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )


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


def _first_virtual_tokens(model: Any, adapter: Adapter, like: Tensor, seed: int) -> Tensor:
    """Of a prompt, real tokens (Lester et al. 2021, section 3.2); else PEFT's normal numbers."""
    if adapter.method != "prompt":
        return initial_tensor(VIRTUAL_TOKENS, tuple(like.shape), 1.0, seed)
    table: Tensor = model.get_input_embeddings().weight.detach()
    generator = named_generator(VIRTUAL_TOKENS, seed)
    tokens = torch.randint(len(table), (adapter.virtual_tokens,), generator=generator)
    return table[tokens.to(table.device)]


def _saved_name(name: str) -> str:
    """A parameter's name in a PEFT folder."""
    return SAVED_VIRTUAL_TOKENS if name == VIRTUAL_TOKENS else name.replace(f".{NAME}", "")


def is_adapted(model: nn.Module) -> bool:
    """Whether ``with_adapter`` made the model."""
    return isinstance(model, peft.PeftModel)


def is_factor(name: str) -> bool:
    """Whether a parameter multiplies activations one by one, and begins at one."""
    return ".ia3_l." in name


def virtual_tokens(model: Any) -> int:
    """How many virtual tokens stand before what the model reads."""
    if not is_adapted(model) or not model.active_peft_config.is_prompt_learning:
        return 0
    return int(model.active_peft_config.num_virtual_tokens)


@torch.no_grad()
def merged_weights(model: nn.Module, gathered: Gathering) -> Iterator[tuple[str, Tensor]]:
    """The weights of the model below, the adapter in them, one at a time; collective.

    Virtual tokens are in no weight.
    """
    below = model.get_base_model()  # type: ignore[operator]
    layers = {
        name: layer
        for name, layer in below.named_modules()
        if isinstance(layer, LoraLayer | IA3Layer)
    }
    for name, parameter in below.named_parameters():
        if parameter.requires_grad:
            continue
        owner, _, kind = name.rpartition(".base_layer.")
        own = [p for p in layers[owner].parameters() if p.requires_grad] if owner else []
        with gathered([parameter, *own]):
            whole = _dequantized(parameter)
            if owner:
                whole = _merged(layers[owner], kind, whole)
            yield name.replace(".base_layer", ""), whole


def _merged(layer: Any, kind: str, whole: Tensor) -> Tensor:
    """A layer's weight or bias with the adapter in it.

    W + alpha / rank x B A (Hu et al. 2021, section 4.1); or inputs or outputs of W and its bias
    scaled (Liu et al. 2022, section 3.3).
    """
    if isinstance(layer, LoraLayer):
        return whole + layer.get_delta_weight(NAME) if kind == "weight" else whole
    scale = layer.ia3_l[NAME].detach()
    if kind == "bias":
        return whole if layer.is_feedforward else whole * scale.flatten()
    return (whole.T * scale).T if layer.fan_in_fan_out else whole * scale


def keep_four_bits_as_stored(model: nn.Module) -> None:
    """Has bitsandbytes compute with 4-bit weights alike in training, validation and merging.

    On CPUs with instructions for bf16 it would pack them for inference at the first validation,
    their scales rounded to bf16: into another layout than ``dequantize_4bit`` reads, and only
    where blocks of scales divide the columns.
    """
    layers: Iterator[Any] = model.modules()
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _dequantized(parameter: nn.Parameter) -> Tensor:
    packed = getattr(parameter, "quant_state", None)
    if packed is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    whole: Tensor = dequantize_4bit(parameter.detach(), packed)
    return whole


def plain_model(model: nn.Module) -> Any:
    """The model below as transformers writes it: with no trace of having been quantized."""
    below: Any = model.get_base_model()  # type: ignore[operator]
    if not getattr(below, "is_quantized", False):
        return below
    config = copy.deepcopy(below.config)
    del config.quantization_config
    with torch.device("meta"):
        return type(below)(config)


@torch.no_grad()
def adapter_weights(model: nn.Module, gathered: Gathering) -> Iterator[tuple[str, Tensor]]:
    """The adapter's weights under the names that a PEFT folder has; collective."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with gathered([parameter]):
                yield _saved_name(name), parameter.detach()


def save_adapter(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Writes a PEFT folder."""
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config[NAME]
    config.inference_mode = True
    config.save_pretrained(folder)
