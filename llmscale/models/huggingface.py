"""Hugging Face folders in and out of any layout: safetensors, configuration, tokenizer."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmscale.artifacts import write_json
from llmscale.models.architecture import LLAMA3_ROTARY, Architecture
from llmscale.models.megatron import global_parameters
from llmscale.models.weights import Weight, weight

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

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files and name.startswith("transformer."):
            name = name.removeprefix("transformer.")
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)


def describe(
    chunk: torch.nn.Module, architecture: Architecture, vocabulary: int
) -> Iterable[tuple[torch.nn.Parameter, Weight]]:
    """Each parameter of a chunk with the description of where its numbers come from."""
    tensor_ranks = parallel_state.get_tensor_model_parallel_world_size()
    padded = architecture.padded_vocabulary(vocabulary, tensor_ranks)
    for name, parameter in global_parameters(chunk):
        yield parameter, weight(name, architecture, vocabulary, padded)


@torch.no_grad()
def fill(
    chunks: Iterable[torch.nn.Module],
    architecture: Architecture,
    vocabulary: int,
    source: HuggingFaceWeights | int,
) -> None:
    """Sets every parameter from a folder's tensors, or from a seed.

    Raises:
        KeyError: if the folder lacks a tensor.
        ValueError: if a tensor has another shape than the architecture gives it.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    for chunk in chunks:
        for parameter, description in describe(chunk, architecture, vocabulary):
            if isinstance(source, int):
                whole = description.initial(source)
            else:
                whole = [source[name] for name in description.names]
            for name, tensor, shape in zip(
                description.names, whole, description.shapes, strict=True
            ):
                if tuple(tensor.shape) != shape:
                    raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
            parameter.copy_(description.form.split(whole, rank, ranks))


@torch.no_grad()
def export(
    chunks: Iterable[torch.nn.Module],
    architecture: Architecture,
    vocabulary: int,
    folder: Path,
) -> None:
    """Writes the model as safetensors, each pipeline stage its own file; collective.

    All ranks call it; rank 0 of each tensor group of the first data rank writes. The
    folder's index and ``config.json`` come from global rank 0.
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    writes = (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank() == 0
    )
    tensors: dict[str, Tensor] = {}
    for chunk in chunks:
        for parameter, description in describe(chunk, architecture, vocabulary):
            shards = _gathered(parameter, description)
            if writes:
                whole = description.form.join(shards)
                names = zip(description.names, whole, strict=True)
                tensors.update({name: tensor.cpu().contiguous() for name, tensor in names})
    if stage == stages - 1 and stages > 1 and architecture.tied:
        tensors.pop(_embedding_name(architecture), None)
    file = SINGLE if stages == 1 else f"model-{stage + 1:05d}-of-{stages:05d}.safetensors"
    if writes:
        save_file(tensors, folder / file, metadata={"format": "pt"})
    sizes = {name: (file, t.numel() * t.element_size()) for name, t in tensors.items() if writes}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, sizes)
    if dist.get_rank() == 0:
        everything = {name: entry for part in gathered for name, entry in part.items()}
        if stages > 1:
            total = sum(size for _, size in everything.values())
            files = {name: file for name, (file, _) in sorted(everything.items())}
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        write_json(folder / "config.json", _config(architecture, vocabulary, dtype))
    dist.barrier()


def _gathered(parameter: torch.nn.Parameter, description: Weight) -> list[Tensor]:
    """The shards of all tensor-parallel ranks, in order."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return [parameter.detach()]
    group = parallel_state.get_tensor_model_parallel_group()
    shards = [torch.empty_like(parameter) for _ in range(group.size())]
    dist.all_gather(shards, parameter.detach().contiguous(), group=group)
    return shards


def _embedding_name(architecture: Architecture) -> str:
    llama = architecture.family == "llama"
    return "model.embed_tokens.weight" if llama else "transformer.wte.weight"


def _config(architecture: Architecture, vocabulary: int, dtype: str) -> dict[str, Any]:
    """``config.json`` as transformers reads it."""
    a = architecture
    shared = {
        "vocab_size": vocabulary,
        "dtype": dtype,
        "initializer_range": a.initial_std,
        "tie_word_embeddings": a.tied,
    }
    if a.family == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_layer": a.layers,
            "n_embd": a.hidden_size,
            "n_head": a.attention_heads,
            "n_inner": a.ffn,
            "n_positions": a.sequence_length,
            "layer_norm_epsilon": a.norm_epsilon,
            "activation_function": "gelu_new",
            **shared,
        }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": a.rotary_base}
    if a.rotary_scaling_factor is not None:
        rope = {**rope, "rope_type": "llama3", "factor": a.rotary_scaling_factor, **LLAMA3_ROTARY}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": a.layers,
        "hidden_size": a.hidden_size,
        "num_attention_heads": a.attention_heads,
        "num_key_value_heads": a.groups,
        "head_dim": a.head,
        "intermediate_size": a.ffn,
        "max_position_embeddings": a.sequence_length,
        "rms_norm_eps": a.norm_epsilon,
        "attention_bias": a.biased,
        "mlp_bias": a.biased,
        "hidden_act": "silu",
        "rope_parameters": rope,
        **shared,
    }
