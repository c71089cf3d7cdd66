"""How each Megatron parameter is cut from Hugging Face tensors, and put together again.

One description serves three ends: reading a Hugging Face folder into any layout, writing
one from any layout, and initial weights that depend on the seed and the global name alone.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmscale.models.shards import Form


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter: its Hugging Face tensors, their shapes, and initial spread.

    ``initial_std`` is 0 for biases, None for norms, which begin at one, and several numbers
    where the tensors' spreads differ.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    form: Form
    initial_std: float | tuple[float, ...] | None

    def initial(self, seed: int) -> list[Tensor]:
        """The whole initial tensors, in fp32."""
        std = self.initial_std
        stds = std if isinstance(std, tuple) else (std,) * len(self.names)
        return [
            initial_tensor(name, shape, own_std, seed)
            for name, shape, own_std in zip(self.names, self.shapes, stds, strict=True)
        ]


def initial_tensor(name: str, shape: tuple[int, ...], std: float | None, seed: int) -> Tensor:
    """A normal tensor that depends on the seed and the name alone."""
    if std is None:
        return torch.ones(shape)
    if std == 0:
        return torch.zeros(shape)
    return torch.empty(shape).normal_(0.0, std, generator=named_generator(name, seed))


def low_rank_start(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """What an adapter's A begins with: PEFT's distribution, by the seed and the name alone."""
    return nn.init.kaiming_uniform_(
        torch.empty(shape), a=math.sqrt(5), generator=named_generator(name, seed)
    )


def named_generator(name: str, seed: int) -> torch.Generator:
    """A generator for what the seed and a name alone decide."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
