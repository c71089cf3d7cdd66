"""How each Megatron parameter is cut from Hugging Face tensors, and put together again.

One description serves three ends: reading a Hugging Face folder into any layout, writing
one from any layout, and initial weights that depend on the seed and the global name alone.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmscale.models.architecture import Architecture


class Form(Protocol):
    """Between whole tensors under Hugging Face names and one shard a tensor-parallel rank."""

    def split(self, whole: Sequence[Tensor], rank: int, ranks: int) -> Tensor:
        """The shard of one rank."""

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """The whole tensors, from the shards of all ranks in order."""


class Replicated:
    """Every rank holds the whole tensor."""

    def split(self, whole: Sequence[Tensor], rank: int, ranks: int) -> Tensor:
        return whole[0]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [shards[0]]


@dataclass(frozen=True)
class Split:
    """Cut evenly along one dimension."""

    dimension: int

    def split(self, whole: Sequence[Tensor], rank: int, ranks: int) -> Tensor:
        return whole[0].chunk(ranks, self.dimension)[rank]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(shards), self.dimension)]


@dataclass(frozen=True)
class Vocabulary:
    """Rows cut evenly after padding with zero rows."""

    rows: int
    padded_rows: int

    def split(self, whole: Sequence[Tensor], rank: int, ranks: int) -> Tensor:
        missing = self.padded_rows - self.rows
        padded = torch.nn.functional.pad(whole[0], (0, 0, 0, missing))
        return padded.chunk(ranks, 0)[rank]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(shards), 0)[: self.rows]]


class Stacked:
    """Several tensors of equal shape (SwiGLU's gate and up), each cut by rows, then stacked."""

    def split(self, whole: Sequence[Tensor], rank: int, ranks: int) -> Tensor:
        return torch.cat([tensor.chunk(ranks, 0)[rank] for tensor in whole])

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        halves = [shard.chunk(2, 0) for shard in shards]
        return [torch.cat([half[part] for half in halves]) for part in range(2)]


@dataclass(frozen=True)
class QueryKeyValue:
    """Query, key and value rows interleaved by key-value head, then cut by those heads."""

    groups: int
    head: int

    def split(self, whole: Sequence[Tensor], rank: int, ranks: int) -> Tensor:
        tail = whole[0].shape[1:]
        by_group = [tensor.reshape(self.groups, -1, *tail) for tensor in whole]
        return torch.cat(by_group, 1).chunk(ranks, 0)[rank].reshape(-1, *tail)

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        whole = torch.cat(list(shards))
        tail = whole.shape[1:]
        by_group = whole.reshape(self.groups, -1, *tail)
        queries = by_group.shape[1] - 2 * self.head
        parts = by_group.split([queries, self.head, self.head], 1)
        return [part.reshape(-1, *tail) for part in parts]


@dataclass(frozen=True)
class Transposed:
    """Another form, over weights stored as ``[inputs, outputs]`` (GPT-2's ``Conv1D``)."""

    form: Form

    def split(self, whole: Sequence[Tensor], rank: int, ranks: int) -> Tensor:
        return self.form.split([tensor.T for tensor in whole], rank, ranks)

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.T.contiguous() for tensor in self.form.join(shards)]


@dataclass(frozen=True)
class Together:
    """Another form, over query, key and value stored as one tensor along the outputs."""

    form: Form

    def split(self, whole: Sequence[Tensor], rank: int, ranks: int) -> Tensor:
        return self.form.split(whole[0].chunk(3, 0), rank, ranks)

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(self.form.join(shards))]


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter: its Hugging Face tensors, their shapes, and initial spread.

    ``initial_std`` is 0 for biases, and None for norms, which begin at one.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    form: Form
    initial_std: float | None

    def initial(self, seed: int) -> list[Tensor]:
        """The whole initial tensors, in fp32."""
        return [
            initial_tensor(name, shape, self.initial_std, seed)
            for name, shape in zip(self.names, self.shapes, strict=True)
        ]


def initial_tensor(name: str, shape: tuple[int, ...], std: float | None, seed: int) -> Tensor:
    """A normal tensor that depends on the seed and the name alone."""
    if std is None:
        return torch.ones(shape)
    if std == 0:
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def weight(name: str, architecture: Architecture, vocabulary: int, padded: int) -> Weight:
    """The description of a Megatron parameter by its global name.

    Args:
        name: as in megatron-core, with the layer's number in the whole model.
        vocabulary: rows of the embedding in the Hugging Face form.
        padded: rows of the embedding over all tensor-parallel ranks.
    """
    name = (
        name.replace("linear_qkv.layer_norm_", "input_layernorm.")
        .replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
        .replace("self_attention.input_layernorm", "input_layernorm")
    )
    rules = _Gpt2(architecture) if architecture.family == "gpt2" else _Llama(architecture)
    hidden = architecture.hidden_size
    outer = {
        "embedding.word_embeddings.weight": rules.embedding,
        "output_layer.weight": rules.embedding if architecture.tied else "lm_head.weight",
    }
    if name in outer:
        form = Vocabulary(vocabulary, padded)
        return Weight((outer[name],), ((vocabulary, hidden),), form, architecture.initial_std)
    if name == "embedding.position_embeddings.weight":
        shape = (architecture.sequence_length, hidden)
        return Weight(("transformer.wpe.weight",), (shape,), Replicated(), architecture.initial_std)
    if name.startswith("decoder.final_layernorm."):
        return rules.norm(rules.final_norm, name.rsplit(".", 1)[1])
    _, _, layer, part = name.split(".", 3)
    module, kind = part.rsplit(".", 1)
    return rules.layer(int(layer), module, kind)


@dataclass(frozen=True)
class _Rules:
    architecture: Architecture

    @property
    def output_std(self) -> float:
        """The spread of projections into the residual stream (Radford et al. 2019, section 2.3)."""
        return self.architecture.initial_std / math.sqrt(2 * self.architecture.layers)

    def norm(self, prefix: str, kind: str) -> Weight:
        std = None if kind == "weight" else 0.0
        return Weight((f"{prefix}.{kind}",), ((self.architecture.hidden_size,),), Replicated(), std)

    def qkv_form(self) -> QueryKeyValue:
        return QueryKeyValue(self.architecture.groups, self.architecture.head)


class _Llama(_Rules):
    embedding = "model.embed_tokens.weight"
    final_norm = "model.norm"

    def layer(self, number: int, module: str, kind: str) -> Weight:
        a, prefix = self.architecture, f"model.layers.{number}"
        queries, keys, hidden = a.attention_heads * a.head, a.groups * a.head, a.hidden_size
        bias = kind == "bias"
        std = 0.0 if bias else a.initial_std
        output_std = 0.0 if bias else self.output_std

        def shape(outputs: int, inputs: int) -> tuple[int, ...]:
            return (outputs,) if bias else (outputs, inputs)

        row: Form = Replicated() if bias else Split(1)
        match module:
            case "input_layernorm":
                return self.norm(f"{prefix}.input_layernorm", kind)
            case "pre_mlp_layernorm":
                return self.norm(f"{prefix}.post_attention_layernorm", kind)
            case "self_attention.linear_qkv":
                names = tuple(f"{prefix}.self_attn.{p}_proj.{kind}" for p in "qkv")
                shapes = tuple(shape(size, hidden) for size in (queries, keys, keys))
                return Weight(names, shapes, self.qkv_form(), std)
            case "self_attention.linear_proj":
                name = f"{prefix}.self_attn.o_proj.{kind}"
                return Weight((name,), (shape(hidden, queries),), row, output_std)
            case "mlp.linear_fc1":
                names = tuple(f"{prefix}.mlp.{p}_proj.{kind}" for p in ("gate", "up"))
                return Weight(names, (shape(a.ffn, hidden),) * 2, Stacked(), std)
            case "mlp.linear_fc2":
                name = f"{prefix}.mlp.down_proj.{kind}"
                return Weight((name,), (shape(hidden, a.ffn),), row, output_std)
        raise KeyError(f"no Llama weight for {module}.{kind}")


class _Gpt2(_Rules):
    embedding = "transformer.wte.weight"
    final_norm = "transformer.ln_f"

    def layer(self, number: int, module: str, kind: str) -> Weight:
        a, prefix = self.architecture, f"transformer.h.{number}"
        hidden = a.hidden_size
        bias = kind == "bias"
        std = 0.0 if bias else a.initial_std
        output_std = 0.0 if bias else self.output_std

        def described(name: str, inputs: int, outputs: int, form: Form, std: float) -> Weight:
            shape = (outputs,) if bias else (inputs, outputs)
            return Weight((f"{prefix}.{name}.{kind}",), (shape,), form, std)

        def stored(form: Form) -> Form:
            return form if bias else Transposed(form)

        row: Form = Replicated() if bias else Transposed(Split(1))
        match module:
            case "input_layernorm":
                return self.norm(f"{prefix}.ln_1", kind)
            case "pre_mlp_layernorm":
                return self.norm(f"{prefix}.ln_2", kind)
            case "self_attention.linear_qkv":
                form = stored(Together(self.qkv_form()))
                return described("attn.c_attn", hidden, 3 * hidden, form, std)
            case "self_attention.linear_proj":
                return described("attn.c_proj", hidden, hidden, row, output_std)
            case "mlp.linear_fc1":
                return described("mlp.c_fc", hidden, a.ffn, stored(Split(0)), std)
            case "mlp.linear_fc2":
                return described("mlp.c_proj", a.ffn, hidden, row, output_std)
        raise KeyError(f"no GPT-2 weight for {module}.{kind}")
