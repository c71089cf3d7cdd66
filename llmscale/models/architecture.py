"""One description of a decoder, from which its Megatron and Hugging Face forms are made."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, ValidationError

from llmscale.errors import RecipeError
from llmscale.parallel.layout import Layout
from llmscale.settings import (
    Problem,
    Settings,
    choices,
    divisors,
    nearest,
    nearest_multiples,
    shown,
)

Family = Literal["llama", "gpt2"]
Size = Annotated[int, Field(gt=0, le=2**24)]

VOCABULARY_MULTIPLE = 128
"""Rows of the embedding are padded to a multiple of this and of the tensor degree."""


LLAMA3_ROTARY = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The constants of Llama 3's stretch of rotary frequencies (Dubey et al. 2024), but its factor."""


class Architecture(Settings):
    """A decoder-only Transformer.

    ``llama``: RMSNorm, rotary positions, SwiGLU, no biases unless asked for, grouped-query
    attention. ``gpt2``: LayerNorm, learned positions, GELU (tanh), biases everywhere.
    """

    family: Family = "llama"
    layers: Size
    hidden_size: Size
    attention_heads: Size
    key_value_heads: Size | None = None
    head_size: Size | None = None
    ffn_size: Size | None = None
    sequence_length: Size
    norm_epsilon: PositiveFloat = 1e-5
    tied_embeddings: bool | None = None
    bias: bool | None = None
    rotary_base: PositiveFloat = 10000.0
    rotary_scaling_factor: PositiveFloat | None = None
    initial_std: PositiveFloat = 0.02

    @property
    def gated(self) -> bool:
        """SwiGLU's two input projections instead of one."""
        return self.family == "llama"

    @property
    def rotary(self) -> bool:
        """Rotary positions; learned ones otherwise."""
        return self.family == "llama"

    @property
    def tied(self) -> bool:
        """The output layer uses the embedding's weights."""
        return self.family == "gpt2" if self.tied_embeddings is None else self.tied_embeddings

    @property
    def groups(self) -> int:
        """Key-value heads."""
        return self.key_value_heads or self.attention_heads

    @property
    def head(self) -> int:
        """Width of one attention head."""
        return self.head_size or self.hidden_size // self.attention_heads

    @property
    def ffn(self) -> int:
        """Width of the feed-forward layer."""
        return self.ffn_size or 4 * self.hidden_size

    @property
    def biased(self) -> bool:
        """All linear layers but the output layer have biases."""
        return self.family == "gpt2" if self.bias is None else self.bias

    def parameters(self, vocabulary: int) -> int:
        """The number of parameters, in closed form, without padding."""
        hidden = self.hidden_size
        queries, keys = self.attention_heads * self.head, self.groups * self.head
        attention = hidden * (queries + 2 * keys) + queries * hidden
        attention += (queries + 2 * keys + hidden) * self.biased
        inputs = 2 if self.gated else 1
        mlp = (inputs + 1) * hidden * self.ffn + (inputs * self.ffn + hidden) * self.biased
        norm = hidden * (2 if self.family == "gpt2" else 1)
        positions = 0 if self.rotary else self.sequence_length * hidden
        embeddings = vocabulary * hidden * (1 if self.tied else 2)
        return self.layers * (attention + mlp + 2 * norm) + norm + positions + embeddings

    def flops_per_token(self, vocabulary: int, sequence_length: int) -> float:
        """Model FLOP to train on one token, forward and backward, without recompute.

        6 for every weight of a matrix product, and ``6 * layers * sequence * heads * head``
        for causal attention's scores and values (half of the full square; Chowdhery et al.
        2022, appendix B counts the whole).
        """
        hidden = self.hidden_size
        queries, keys = self.attention_heads * self.head, self.groups * self.head
        weights = hidden * (2 * queries + 2 * keys) + (3 if self.gated else 2) * hidden * self.ffn
        attention = 6 * self.layers * sequence_length * queries
        return 6.0 * (self.layers * weights + vocabulary * hidden) + attention

    def problems(self) -> Iterator[Problem]:
        """What cannot be built, at any layout."""
        if self.head_size is None and self.hidden_size % self.attention_heads:
            yield Problem(
                ("attention_heads",),
                f"{self.attention_heads} does not divide hidden_size {self.hidden_size}; "
                f"{self._other_heads()}",
            )
        if self.attention_heads % self.groups:
            yield Problem(
                ("key_value_heads",),
                f"{self.groups} does not divide {self.attention_heads} attention heads; "
                f"use {choices(nearest(divisors(self.attention_heads), self.groups))}",
            )
        if self.rotary and self.head % 2:
            yield self._odd_head()
        if self.family == "gpt2":
            yield from self._gpt2_problems()

    def _odd_head(self) -> Problem:
        if self.head_size is not None:
            wanted = choices(nearest((self.head - 1 or 2, self.head + 1), self.head))
            message = f"{self.head} is odd, but rotary positions need an even size; use {wanted}"
            return Problem(("head_size",), message)
        return Problem(
            ("attention_heads",),
            f"hidden_size {self.hidden_size} / {self.attention_heads} heads is a head size of "
            f"{self.head}, but rotary positions need an even one; {self._other_heads()}",
        )

    def _other_heads(self) -> str:
        fitting = [
            heads
            for heads in divisors(self.hidden_size)
            if heads % (self.key_value_heads or 1) == 0
            and (not self.rotary or self.hidden_size // heads % 2 == 0)
        ]
        offered = nearest(fitting, self.attention_heads)
        return f"use {choices(offered)}, or set head_size" if offered else "set head_size"

    def _gpt2_problems(self) -> Iterator[Problem]:
        fixed = {
            "key_value_heads": self.groups != self.attention_heads,
            "head_size": self.head * self.attention_heads != self.hidden_size,
            "tied_embeddings": not self.tied,
            "bias": not self.biased,
            "rotary_scaling_factor": self.rotary_scaling_factor is not None,
        }
        for key, differs in fixed.items():
            if differs:
                yield Problem((key,), "GPT-2 has no such form; remove it, or use family: llama")

    def layout_problems(
        self, layout: Layout, sequence_length: int | None = None
    ) -> Iterator[Problem]:
        """What the layout cannot split evenly; paths are the layout's keys.

        ``sequence_length`` is that of the training samples, where it is not the model's.
        """
        yield from layout.stage_problems(self.layers)
        fitting = divisors(math.gcd(self.attention_heads, self.groups, self.ffn))
        for what, number in (
            ("attention heads", self.attention_heads),
            ("key-value heads", self.groups),
            ("units of ffn_size", self.ffn),
        ):
            if number % layout.tensor:
                yield Problem(
                    ("tensor",),
                    f"{layout.tensor} does not divide {number} {what}; "
                    f"use {choices(nearest(fitting, layout.tensor))}",
                )
        length = sequence_length or self.sequence_length
        if layout.sequence and length % layout.tensor:
            yield Problem(
                ("sequence",),
                f"tensor {layout.tensor} does not divide sequence_length {length}; "
                f"use sequence_length {nearest_multiples(length, layout.tensor)}, "
                "or remove sequence",
            )

    def padded_vocabulary(self, vocabulary: int, tensor: int) -> int:
        """Rows of the embedding table; rows past ``vocabulary`` never take part in a loss."""
        multiple = math.lcm(VOCABULARY_MULTIPLE, tensor)
        return -(-vocabulary // multiple) * multiple

    @classmethod
    def from_huggingface(cls, folder: Path) -> "Architecture":
        """Reads ``config.json`` of a Llama or GPT-2 folder, without importing transformers.

        Raises:
            RecipeError: if the folder holds no such configuration, or one of another family.
        """
        config = _huggingface_config(folder)
        kind = config.get("model_type")
        if kind not in ("llama", "gpt2"):
            raise RecipeError(
                f"{folder}/config.json: model_type {shown(kind)} is not supported; "
                "give a folder of type llama or gpt2"
            )
        read = _llama_settings if kind == "llama" else _gpt2_settings
        try:
            return cls(**read(folder, config))
        except KeyError as error:
            cause = f"{error.args[0]} is missing"
        except ValidationError as error:
            wrong = error.errors()[0]
            cause = f"{wrong['loc'][0]} cannot be {shown(wrong['input'])}"
        except (AttributeError, TypeError):
            cause = "a value is of the wrong type"
        raise RecipeError(f"{folder}/config.json: {cause}; give a model's own folder")


def huggingface_vocabulary(folder: Path) -> int:
    """The size of a Hugging Face model's vocabulary.

    Raises:
        RecipeError: if the folder's ``config.json`` does not say.
    """
    size = _huggingface_config(folder).get("vocab_size")
    if not isinstance(size, int):
        raise RecipeError(f"{folder}/config.json: vocab_size is missing; give a model's folder")
    return size


def _huggingface_config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        cause = error.strerror if isinstance(error, OSError) else "is no JSON mapping"
        raise RecipeError(f"{folder}/config.json: {cause}; give a Hugging Face folder") from None


def _llama_settings(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    _require(folder, config, "hidden_act", "silu")
    _require(folder, config, "mlp_bias", config.get("attention_bias", False))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise RecipeError(f"{folder}/config.json: rope_type {kind!r} is not default or llama3")
    factor = None
    if kind == "llama3":
        factor = rope["factor"]
        for key, value in LLAMA3_ROTARY.items():
            _require(folder, rope, key, value)
    return {
        "family": "llama",
        "layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "attention_heads": config["num_attention_heads"],
        "key_value_heads": config.get("num_key_value_heads"),
        "head_size": config.get("head_dim"),
        "ffn_size": config["intermediate_size"],
        "sequence_length": config["max_position_embeddings"],
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "tied_embeddings": config.get("tie_word_embeddings", False),
        "bias": config.get("attention_bias", False),
        "rotary_base": rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        "rotary_scaling_factor": factor,
    }


def _gpt2_settings(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    _require(folder, config, "activation_function", "gelu_new")
    return {
        "family": "gpt2",
        "layers": config["n_layer"],
        "hidden_size": config["n_embd"],
        "attention_heads": config["n_head"],
        "ffn_size": config.get("n_inner") or 4 * config["n_embd"],
        "sequence_length": config["n_positions"],
        "norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
    }


def _require(folder: Path, config: dict[str, Any], key: str, value: object) -> None:
    if config.get(key, value) != value:
        raise RecipeError(
            f"{folder}/config.json: {key} {shown(config[key])} is not supported; "
            f"give a folder whose {key} is {shown(value)}"
        )
