"""How each Megatron parameter is cut from Hugging Face tensors, and put together again.

One description serves three ends: reading a Hugging Face folder into any layout, writing
one from any layout, and initial weights that depend on the seed and the global name alone.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from llmscale.models.shards import Form


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
