"""Rotating a decoder's hidden states, which changes its weights and not what it computes.

QuaRot (Ashkboos et al. 2024), as far as it is folded into weights: RMS norms leave the length of
their input, so that with their weights moved into the layers behind them the residual stream may
be turned by any orthogonal matrix; each head's values are turned by another, and back by the layer
that reads them. Weights that stand out are spread over all columns, and round with less error.

Shape legend: d hidden size, v vocabulary, o outputs (rows), i inputs (columns), h size of a head.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmscale.errors import RecipeError
from llmscale.quantization.blocks import BlockwiseModel, StoredTensors

ROTATED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose tensors have the names below, and whose norms divide by the root mean square."""

EMBEDDINGS, LAST_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
ROWS_AT_ONCE = 4096
READERS = {
    "self_attn.q_proj.weight": "input_layernorm.weight",
    "self_attn.k_proj.weight": "input_layernorm.weight",
    "self_attn.v_proj.weight": "input_layernorm.weight",
    "mlp.gate_proj.weight": "post_attention_layernorm.weight",
    "mlp.up_proj.weight": "post_attention_layernorm.weight",
}
"""Weights that read the residual stream, and the norm before each."""

WRITERS = ("self_attn.o_proj.", "mlp.down_proj.")
"""Layers that add to it."""


def rotate(model: BlockwiseModel, seed: int = 0) -> None:
    """Gives a model's tensors rotated from now on; embeddings and head are no longer tied.

    Raises:
        RecipeError: if it is of a family whose tensors are not known.
    """
    kind = model.config.model_type
    if kind not in ROTATED_FAMILIES:
        raise RecipeError(
            f"{model.folder}: {kind} cannot be rotated, only {', '.join(ROTATED_FAMILIES)}; use "
            "int4-gptq"
        )
    model.weights = RotatedWeights(model.weights, model.config, seed)
    model.untie()


class RotatedWeights:
    """The tensors of a folder by name, each rotated as it is read, in fp32."""

    def __init__(self, weights: StoredTensors, config: Any, seed: int) -> None:
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        self._weights = weights
        self._turn_dd = orthogonal(config.hidden_size, seed)
        self._turn_hh = orthogonal(size, seed + 1)

    def __contains__(self, name: str) -> bool:
        return name in self._weights or name == HEAD

    def __iter__(self) -> Iterator[str]:
        yield from self._weights
        if HEAD not in self._weights:
            yield HEAD

    def __getitem__(self, name: str) -> Tensor:
        if name == EMBEDDINGS:
            return _turned_rows(self._weights[name], self._turn_dd)
        if name == HEAD:
            source = HEAD if HEAD in self._weights else EMBEDDINGS
            return _turned_rows(
                self._weights[source], self._norm(LAST_NORM)[:, None] * self._turn_dd
            )
        return self._rotated(name, self._weights[name].double()).float()

    def _rotated(self, name: str, tensor: Tensor) -> Tensor:
        if name == LAST_NORM or name.endswith("_layernorm.weight"):
            return torch.ones_like(tensor)
        block, part = _parts(name)
        if part in READERS:
            tensor = tensor * self._norm(block + READERS[part]) @ self._turn_dd
        if part.startswith("self_attn.v_proj."):
            tensor = self._turned_heads(tensor)
        if part == "self_attn.o_proj.weight":
            tensor = self._turned_heads(tensor.T).T
        if part.startswith(WRITERS):
            tensor = self._turn_dd.T @ tensor
        return tensor

    def _norm(self, name: str) -> Tensor:
        return self._weights[name].double()

    def _turned_heads(self, tensor: Tensor) -> Tensor:
        """Rows [h times heads, ...], each head's turned."""
        heads = tensor.reshape(-1, len(self._turn_hh), *tensor.shape[1:])
        return torch.einsum("hk,nh...->nk...", self._turn_hh, heads).reshape(tensor.shape)


def _turned_rows(rows_vd: Tensor, turn_dd: Tensor) -> Tensor:
    """Rows of a vocabulary, some at a time: in fp64 all of them would be a small model's size."""
    turned_vd = torch.empty(rows_vd.shape)
    parts = (tensor.split(ROWS_AT_ONCE) for tensor in (rows_vd, turned_vd))
    for rows, turned in zip(*parts, strict=True):
        turned.copy_(rows.double() @ turn_dd)
    return turned_vd


def orthogonal(size: int, seed: int) -> Tensor:
    """A matrix [size, size] in fp64 that spreads each direction over all: random, by the seed.

    The Kronecker product of a Hadamard matrix, of the largest power of two that divides the size,
    and of a random orthogonal matrix; its rows have random signs.
    """
    random = torch.Generator().manual_seed(seed)
    power = size & -size
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    odd = torch.randn(size // power, size // power, generator=random, dtype=torch.float64)
    signs = torch.randint(0, 2, (size, 1), generator=random) * 2 - 1
    return signs * torch.kron(hadamard / power**0.5, torch.linalg.qr(odd).Q.contiguous())


def _parts(name: str) -> tuple[str, str]:
    """``model.layers.3.mlp.up_proj.weight`` as ``model.layers.3.`` and the rest."""
    words = name.split(".")
    places = [place for place, word in enumerate(words) if word.isdigit()]
    if not places:
        return "", name
    return ".".join(words[: places[0] + 1]) + ".", ".".join(words[places[0] + 1 :])
