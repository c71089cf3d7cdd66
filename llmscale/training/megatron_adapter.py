"""A low-rank adapter (Hu et al. 2021, LoRA) on a frozen Megatron model: made, started, saved."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import (
    make_sharded_tensor_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from llmscale.artifacts import write_json
from llmscale.errors import RecipeError
from llmscale.models.architecture import Architecture
from llmscale.models.families.base import Rules
from llmscale.models.families.rules import weight_rules
from llmscale.models.low_rank import LINEARS, LowRank, layer_factors, low_rank_pairs, put_beside
from llmscale.models.megatron import inner_model
from llmscale.models.shards import Replicated
from llmscale.training.settings import Adapter, no_such_target


def add_adapter(
    chunks: Iterable[nn.Module], architecture: Architecture, vocabulary: int, adapter: Adapter
) -> None:
    """Freezes a model and puts pairs, not yet set, beside its linear layers.

    Raises:
        RecipeError: if the model lacks a linear layer that ``targets`` names.
    """
    tensor_ranks = parallel_state.get_tensor_model_parallel_world_size()
    rules = weight_rules(architecture, vocabulary, tensor_ranks)
    targets = _targets(rules, adapter)
    for chunk in chunks:
        model = inner_model(chunk)
        model.requires_grad_(False)
        for layer in model.decoder.layers:
            for module in LINEARS:
                beside = layer.get_submodule(module)
                weight = rules.layer(layer.layer_number - 1, module, "weight")
                low_rank = LowRank(beside, weight, targets, adapter.rank, adapter.alpha)
                if low_rank.pairs:
                    put_beside(beside, low_rank)
        if model.pre_process and model.config.recompute_granularity == "full":
            # A layer that is computed again has gradients only if its input has one.
            model.embedding.register_forward_hook(_requiring_gradient)


def _requiring_gradient(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_()


def _targets(rules: Rules, adapter: Adapter) -> set[str]:
    known = {factors.target for factors in layer_factors(rules, 0)}
    for target in adapter.targets or ():
        if target not in known:
            raise RecipeError(no_such_target(target, known))
    return known if adapter.targets is None else set(adapter.targets)


def adapter_parameters(architecture: Architecture, vocabulary: int, adapter: Adapter) -> int:
    """How many the adapter of the whole model has."""
    rules = weight_rules(architecture, vocabulary, 1)
    targets = _targets(rules, adapter)
    return sum(
        adapter.rank * (factors.inputs + factors.outputs)
        for layer in range(architecture.layers)
        for factors in layer_factors(rules, layer)
        if factors.target in targets
    )


def start_adapter(chunks: Iterable[nn.Module], seed: int) -> None:
    """The first numbers of a new adapter, with which the model is as without it."""
    for pair in low_rank_pairs(chunks):
        pair.start(seed)


def adapter_state(chunks: Iterable[nn.Module]) -> dict[str, Any]:
    """The adapter as sharded tensors whose keys and offsets do not depend on the layout."""
    state = {}
    for pair in low_rank_pairs(chunks):
        for part in pair.parts():
            if isinstance(part.form, Replicated):
                sharded = make_sharded_tensor_for_checkpoint(part.parameter, part.name)
            else:
                axis = part.parameter.partition_dim  # type: ignore[attr-defined]
                sharded = make_tp_sharded_tensor_for_checkpoint(part.parameter, part.name, axis)
            state[part.name] = sharded
    return state


@torch.no_grad()
def set_adapter(chunks: Iterable[nn.Module], loaded: dict[str, Tensor]) -> None:
    """Puts loaded tensors into the model; the counterpart of ``adapter_state``."""
    for pair in low_rank_pairs(chunks):
        for part in pair.parts():
            part.parameter.copy_(loaded[part.name])


def weight_changes(chunks: Iterable[nn.Module]) -> dict[str, Tensor]:
    """What the adapter adds to this rank's part of the model, by Hugging Face names.

    Every rank of a tensor group calls it, and gets the same.
    """
    return {f"{pair.factors.name}.weight": pair.change() for pair in low_rank_pairs(chunks)}


def export_adapter(chunks: Iterable[nn.Module], adapter: Adapter, folder: Path) -> None:
    """Writes the adapter as a PEFT folder; collective."""
    pairs = list(low_rank_pairs(chunks))
    own = {part.name: part.whole().cpu().contiguous() for pair in pairs for part in pair.parts()}
    everyone: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.gather_object(own if _first_copy() else {}, everyone if dist.get_rank() == 0 else None)
    if dist.get_rank() == 0:
        folder.mkdir()
        tensors = {name: tensor for part in everyone for name, tensor in part.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        about = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": adapter.rank,
            "lora_alpha": adapter.alpha,
            "lora_dropout": 0.0,
            "target_modules": sorted({pair.factors.target for pair in pairs}),
            "fan_in_fan_out": pairs[0].factors.transposed,
            "bias": "none",
            "inference_mode": True,
        }
        write_json(folder / "adapter_config.json", about)
    dist.barrier()


def _first_copy() -> bool:
    """Whether no rank before this one holds the same part of the model, joined."""
    copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return not copy and not parallel_state.get_tensor_model_parallel_rank()
