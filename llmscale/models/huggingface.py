"""Hugging Face folders in and out of any layout: safetensors, configuration, tokenizer."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save_file
from torch import Tensor

from llmscale.artifacts import write_json
from llmscale.models.architecture import Architecture
from llmscale.models.families.rules import weight_rules
from llmscale.models.huggingface_config import write_config
from llmscale.models.megatron import global_parameters, tensor_group
from llmscale.models.stored_weights import INDEX, SINGLE
from llmscale.models.weights import Weight


class TensorSource(Protocol):
    """Hugging Face tensors by name."""

    def __getitem__(self, name: str) -> Tensor: ...


def describe(
    chunk: torch.nn.Module, architecture: Architecture, vocabulary: int
) -> Iterable[tuple[str, torch.nn.Parameter, Weight]]:
    """A chunk's parameters by global name, each with where its numbers come from."""
    tensor_ranks = parallel_state.get_tensor_model_parallel_world_size()
    rules = weight_rules(architecture, vocabulary, tensor_ranks)
    for name, parameter in global_parameters(chunk):
        yield name, parameter, rules.weight(name)


@torch.no_grad()
def fill(
    chunks: Iterable[torch.nn.Module],
    architecture: Architecture,
    vocabulary: int,
    source: TensorSource | int,
) -> None:
    """Sets every parameter from a folder's tensors, or from a seed.

    Raises:
        KeyError: if the folder lacks a tensor.
        ValueError: if a tensor has another shape than the architecture gives it.
    """
    for chunk in chunks:
        for _, parameter, description in describe(chunk, architecture, vocabulary):
            if isinstance(source, int):
                whole = description.initial(source)
            else:
                whole = [source[name] for name in description.names]
            for name, tensor, shape in zip(
                description.names, whole, description.shapes, strict=True
            ):
                if tuple(tensor.shape) != shape:
                    raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
            group = tensor_group(parameter)
            parameter.copy_(description.form.split(whole, group.rank(), group.size()))


@torch.no_grad()
def whole_tensors(
    chunks: Iterable[torch.nn.Module],
    architecture: Architecture,
    vocabulary: int,
    changes: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """This rank's part of the model by Hugging Face names, joined over its tensor group.

    Every rank of a tensor group calls it, and gets the same. Parts of different pipeline
    stages and experts do not overlap, but for tied tables.

    Args:
        changes: what is added to tensors of this rank's part, by name.
    """
    tensors: dict[str, Tensor] = {}
    for chunk in chunks:
        for _, parameter, description in describe(chunk, architecture, vocabulary):
            whole = description.form.join(_gathered(parameter))
            tensors.update(zip(description.names, whole, strict=True))
    return tensors | {name: tensors[name] + change for name, change in (changes or {}).items()}


def tensors_everywhere(own: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all ranks' parts, one at a time, on every rank in one order; collective.

    Args:
        own: this rank's; what several have is the same on each.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: (t.shape, t.dtype) for name, t in own.items()})
    holders: dict[str, int] = {}
    for rank, part in enumerate(everyone):
        for name in part:
            holders.setdefault(name, rank)
    for name, holder in holders.items():
        if all(name in part for part in everyone):
            yield name, own[name]
            continue
        shape, dtype = everyone[holder][name]
        tensor = own.get(name)
        if tensor is None:
            tensor = torch.empty(shape, dtype=dtype, device=next(iter(own.values())).device)
        tensor = tensor.contiguous()
        dist.broadcast(tensor, holder)
        yield name, tensor


@torch.no_grad()
def export(
    chunks: Iterable[torch.nn.Module],
    architecture: Architecture,
    vocabulary: int,
    folder: Path,
    changes: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the model as safetensors; collective.

    Each pipeline stage, and in it each expert-parallel rank, writes what none before it has.
    The folder's index and ``config.json`` come from global rank 0.

    Args:
        changes: what is added to tensors of this rank's part, by name.
    """
    tensors = whole_tensors(chunks, architecture, vocabulary, changes)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    holders: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(holders, list(tensors))
    rank = dist.get_rank()
    before = {name for names in holders[:rank] for name in names}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in before}
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, sizes)
    writers = [number for number, part in enumerate(gathered) if part]
    files = {
        number: SINGLE
        if len(writers) == 1
        else f"model-{place:05d}-of-{len(writers):05d}.safetensors"
        for place, number in enumerate(writers, 1)
    }
    if tensors:
        save_file(tensors, folder / files[rank], metadata={"format": "pt"})
    if rank == 0:
        if len(writers) > 1:
            places = {name: files[number] for number in writers for name in gathered[number]}
            total = sum(size for part in gathered for size in part.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            write_json(folder / INDEX, index)
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        write_json(folder / "config.json", write_config(architecture, vocabulary, dtype))
    dist.barrier()


def _gathered(parameter: torch.nn.Parameter) -> list[Tensor]:
    """The shards of all tensor-parallel ranks, in order."""
    group = tensor_group(parameter)
    if not getattr(parameter, "tensor_model_parallel", False) or group.size() == 1:
        return [parameter.detach()]
    shards = [torch.empty_like(parameter) for _ in range(group.size())]
    dist.all_gather(shards, parameter.detach().contiguous(), group=group)
    return shards
