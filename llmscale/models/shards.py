"""How a parameter's shard is cut from whole tensors, and how shards are joined again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


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
        table = whole[0]
        missing = table.new_zeros(self.padded_rows - self.rows, *table.shape[1:])
        return torch.cat([table, missing]).chunk(ranks, 0)[rank]

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
    """Query, key and value rows interleaved by key-value head, then cut by those heads.

    Cross attention has keys and values alone.
    """

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
        sizes = [queries, self.head, self.head] if queries else [self.head, self.head]
        parts = by_group.split(sizes, 1)
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
