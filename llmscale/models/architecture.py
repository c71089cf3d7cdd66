"""One description of a model, from which its Megatron and Hugging Face forms are made."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from llmscale.data.span_lengths import span_lengths
from llmscale.parallel.layout import Layout
from llmscale.settings import (
    Problem,
    Settings,
    choices,
    divisors,
    nearest,
)

Family = Literal["llama", "qwen2", "qwen3", "mixtral", "gpt2", "bert", "t5"]
Objective = Literal["causal", "masked", "spans"]
Size = Annotated[int, Field(gt=0, le=2**24)]

VOCABULARY_MULTIPLE = 128
"""Rows of the embedding are padded to a multiple of this and of the tensor degree."""


@dataclass(frozen=True)
class Traits:
    """What a family's models have in common.

    ``biases``: on all linear layers but the output layer, on queries, keys and values alone,
    or on none. ``own`` are the keys of a recipe's model that only such families have.
    """

    objective: Objective = "causal"
    positions: Literal["rotary", "learned", "relative"] = "rotary"
    norm: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    activation: Literal["silu", "gelu_tanh", "gelu", "relu"] = "silu"
    gated: bool = True
    tied: bool = False
    biases: Literal["none", "attention inputs", "all"] = "none"
    query_key_norm: bool = False
    own: frozenset[str] = frozenset()


ROTARY_KEYS = frozenset({"key_value_heads", "head_size", "rotary_base"})
FAMILIES: dict[str, Traits] = {
    "llama": Traits(own=ROTARY_KEYS | {"tied_embeddings", "bias", "rotary_scaling_factor"}),
    "qwen2": Traits(biases="attention inputs", own=ROTARY_KEYS | {"tied_embeddings"}),
    "qwen3": Traits(query_key_norm=True, own=ROTARY_KEYS | {"tied_embeddings"}),
    "mixtral": Traits(
        own=ROTARY_KEYS | {"tied_embeddings", "experts", "experts_per_token", "balance_coefficient"}
    ),
    "gpt2": Traits(
        positions="learned",
        norm="LayerNorm",
        activation="gelu_tanh",
        gated=False,
        tied=True,
        biases="all",
    ),
    "bert": Traits(
        objective="masked",
        positions="learned",
        norm="LayerNorm",
        activation="gelu",
        gated=False,
        tied=True,
        biases="all",
    ),
    "t5": Traits(
        objective="spans",
        positions="relative",
        activation="gelu_tanh",
        own=frozenset(
            {"head_size", "tied_embeddings", "decoder_layers", "relative_buckets"}
            | {"relative_distance", "gated"}
        ),
    ),
}
"""Llama (Touvron et al. 2023), Qwen2 (Yang et al. 2024), Qwen3 (Yang et al. 2025), Mixtral
(Jiang et al. 2024), GPT-2 (Radford et al. 2019), BERT (Devlin et al. 2019), and T5 in its
version 1.1 (Raffel et al. 2020; Shazeer 2020), or with ``gated: false`` its first one."""

TOKEN_TYPES = 2
"""Rows of BERT's table of token types; only the first is used, since samples are not paired."""


class Architecture(Settings):
    """A Transformer of one of ``FAMILIES``; what is left out is as the family has it.

    ``layers`` of t5 are those of its encoder. ``balance_coefficient`` weighs the loss that
    spreads tokens over experts (Fedus et al. 2022, section 2.2), taken over each sequence.
    """

    family: Family = "llama"
    layers: Size
    decoder_layers: Size | None = None
    hidden_size: Size
    attention_heads: Size
    key_value_heads: Size | None = None
    head_size: Size | None = None
    ffn_size: Size | None = None
    sequence_length: Size
    norm_epsilon: PositiveFloat = 1e-5
    tied_embeddings: bool | None = None
    bias: bool | None = None
    gated: bool | None = None
    rotary_base: Annotated[float, Field(gt=1)] = 10000.0
    rotary_scaling_factor: PositiveFloat | None = None
    relative_buckets: Annotated[int, Field(ge=4, le=2**16)] = 32
    relative_distance: Size = 128
    experts: PositiveInt | None = None
    experts_per_token: PositiveInt = 2
    balance_coefficient: NonNegativeFloat = 0.01
    initial_std: PositiveFloat = 0.02

    @property
    def traits(self) -> Traits:
        """What the family says."""
        return FAMILIES[self.family]

    @property
    def gated_ffn(self) -> bool:
        """Two input projections instead of one, as in SwiGLU."""
        return self.traits.gated if self.gated is None else self.gated

    @property
    def activation(self) -> str:
        """The feed-forward layer's function; T5's first version has ReLU."""
        return self.traits.activation if self.gated_ffn or self.family != "t5" else "relu"

    @property
    def rotary(self) -> bool:
        """Rotary positions."""
        return self.traits.positions == "rotary"

    @property
    def tied(self) -> bool:
        """The output layer uses the embedding's weights."""
        return self.traits.tied if self.tied_embeddings is None else self.tied_embeddings

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
        return self.traits.biases == "all" if self.bias is None else self.bias

    @property
    def query_bias(self) -> bool:
        """Queries, keys and values have biases."""
        return self.biased or self.traits.biases == "attention inputs"

    @property
    def decoders(self) -> int:
        """Layers of t5's decoder; 0 in all other families."""
        return (self.decoder_layers or self.layers) if self.family == "t5" else 0

    @property
    def all_layers(self) -> int:
        """Layers that a pipeline lays out: an encoder's, then a decoder's."""
        return self.layers + self.decoders

    @property
    def scored(self) -> tuple[str, ...]:
        """What the heads of a model that scores texts say; none of one that predicts tokens."""
        return ()

    def parameters(self, vocabulary: int) -> int:
        """The number of parameters, in closed form, without padding."""
        hidden = self.hidden_size
        norm = hidden * (2 if self.traits.norm == "LayerNorm" else 1)
        layer = self.attention_parameters() + self.mlp_parameters() + 2 * norm
        cross = self.decoders * (self.attention_parameters() + norm)
        output = len(self.scored) if self.scored else 0 if self.tied else vocabulary
        tables = (vocabulary + output) * hidden
        outer = {"learned": self.sequence_length * hidden, "rotary": 0}.get(
            self.traits.positions, 2 * self.relative_buckets * self.attention_heads
        )
        final = {"t5": 2 * norm}.get(self.family, norm)
        if self.family == "bert":
            final = norm + hidden * (hidden + 1) + vocabulary  # the head that guesses tokens
            outer += TOKEN_TYPES * hidden + norm
        return self.all_layers * layer + cross + tables + outer + final

    def attention_parameters(self) -> int:
        """Of one attention, self or cross, without its norm."""
        queries, keys = self.attention_heads * self.head, self.groups * self.head
        inputs = queries + 2 * keys
        weights = self.hidden_size * (inputs + queries)
        biases = inputs * self.query_bias + self.hidden_size * self.biased
        return weights + biases + 2 * self.head * self.traits.query_key_norm

    def mlp_parameters(self) -> int:
        """Of one feed-forward layer, all its experts together, without its norm."""
        hidden, inputs = self.hidden_size, 2 if self.gated_ffn else 1
        one = (inputs + 1) * hidden * self.ffn + (inputs * self.ffn + hidden) * self.biased
        return self.experts * (one + hidden) if self.experts else one

    def flops_per_sample(self, vocabulary: int, sequence_length: int) -> float:
        """Model FLOP to train on one sample, forward and backward, without recompute.

        6 for every weight of a matrix product that a token passes, and for attention's scores
        and values ``12 * queries * keys * heads * head``, half of it under a causal mask
        (Chowdhery et al. 2022, appendix B counts the whole).

        Args:
            sequence_length: tokens the model reads; t5's decoder predicts what was taken out.
        """
        hidden = self.hidden_size
        width, keys = self.attention_heads * self.head, self.groups * self.head
        active = self.experts_per_token if self.experts else 1
        mlp = active * (3 if self.gated_ffn else 2) * hidden * self.ffn
        inner = hidden * (2 * width + 2 * keys) + mlp
        outer = (len(self.scored) or vocabulary) * hidden
        outer += hidden * hidden if self.family == "bert" else 0
        square = 12.0 * width * sequence_length**2
        if self.traits.objective == "causal":
            square /= 2
        if self.family != "t5":
            return 6.0 * sequence_length * (self.layers * inner + outer) + self.layers * square
        target = span_lengths(sequence_length).target
        cross_inputs = 2 * hidden * width
        decoder = target * (inner + 2 * hidden * width) + sequence_length * cross_inputs
        scores = 12 * width * (target * target / 2 + target * sequence_length)
        return (
            6.0 * sequence_length * self.layers * inner
            + self.layers * square
            + self.decoders * (6.0 * decoder + scores)
            + 6.0 * target * outer
        )

    def problems(self) -> Iterator[Problem]:
        """What cannot be built, at any layout."""
        yield from self._foreign_keys()
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
        if self.family == "mixtral":
            yield from self._expert_problems()
        if (
            self.family == "t5"
            and self.initial_std != type(self).model_fields["initial_std"].default
        ):
            yield Problem(("initial_std",), "t5 has spreads of its own; remove it")
        if self.relative_distance <= self.relative_buckets // 2:
            yield Problem(
                ("relative_distance",),
                f"{self.relative_distance} is no more than half of relative_buckets "
                f"{self.relative_buckets}; use at least {self.relative_buckets // 2 + 1}",
            )

    def _foreign_keys(self) -> Iterator[Problem]:
        for key in sorted(frozenset().union(*(traits.own for traits in FAMILIES.values()))):
            given, default = getattr(self, key), type(self).model_fields[key].default
            if key in self.traits.own or given in (default, self._of_family(key)):
                continue
            owners = [name for name, traits in FAMILIES.items() if key in traits.own]
            yield Problem(
                (key,),
                f"{self.family} has no such form; remove it, or use family: {choices(owners)}",
            )

    def _of_family(self, key: str) -> object:
        """What a key may say in a family that leaves no choice."""
        fixed: dict[str, object] = {
            "key_value_heads": self.attention_heads,
            "head_size": self.hidden_size / self.attention_heads,
            "tied_embeddings": self.traits.tied,
            "bias": self.traits.biases == "all",
            "gated": self.traits.gated,
        }
        return fixed.get(key)

    def _expert_problems(self) -> Iterator[Problem]:
        if self.experts is None:
            yield Problem(("experts",), "mixtral needs it; set experts: 8")
        elif self.experts_per_token > self.experts:
            yield Problem(
                ("experts_per_token",),
                f"{self.experts_per_token} is above experts {self.experts}; "
                f"use at most {self.experts}",
            )

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

    def layout_problems(
        self, layout: Layout, sequence_length: int | None = None
    ) -> Iterator[Problem]:
        """What the layout cannot split evenly; paths are the layout's keys.

        ``sequence_length`` is that of the training samples, where it is not the model's.
        """
        yield from layout.stage_problems(self.all_layers)
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
        yield from self._expert_layout_problems(layout)
        yield from self.length_problems(layout, sequence_length or self.sequence_length)

    def length_problems(self, layout: Layout, length: int) -> Iterator[Problem]:
        """What stops samples of ``length`` tokens at this layout; paths are the layout's keys."""
        misfits = list(layout.length_problems(length))
        yield from misfits
        if self.traits.objective == "spans" and not misfits:
            yield from _target_problems(layout, length)

    def _expert_layout_problems(self, layout: Layout) -> Iterator[Problem]:
        if layout.expert > 1 and not self.experts:
            yield Problem(("expert",), f"{self.family} has no experts; remove it")
        elif self.experts and self.experts % layout.expert:
            yield Problem(
                ("expert",),
                f"{layout.expert} does not divide {self.experts} experts; "
                f"use {choices(nearest(divisors(self.experts), layout.expert))}",
            )
        if self.experts and layout.tensor > 1 and not layout.sequence:
            yield Problem(("sequence",), "experts at tensor above 1 need it; set sequence: true")

    def padded_vocabulary(self, vocabulary: int, tensor: int) -> int:
        """Rows of the embedding table; rows past ``vocabulary`` never take part in a loss."""
        multiple = math.lcm(VOCABULARY_MULTIPLE, tensor)
        return -(-vocabulary // multiple) * multiple


class RewardArchitecture(Architecture):
    """A decoder that scores texts: instead of an output layer it has a head a score."""

    heads: Annotated[tuple[str, ...], Field(min_length=1)]

    @classmethod
    def upon(cls, below: Architecture, heads: tuple[str, ...]) -> "RewardArchitecture":
        """The same Transformer with these heads."""
        plain = {name: getattr(below, name) for name in Architecture.model_fields}
        return cls(**plain, heads=heads)

    @property
    def scored(self) -> tuple[str, ...]:
        return self.heads

    @property
    def tied(self) -> bool:
        """Whether there is an output layer with the embedding's weights: there is none."""
        return False


def _target_problems(layout: Layout, length: int) -> Iterator[Problem]:
    """What stops the tokens that t5 predicts from being split as its input is."""
    target = span_lengths(length).target
    for problem in layout.length_problems(target):
        fitting = (
            longer
            for longer in range(2 * length, 65 * length, length)
            if not any(layout.length_problems(span_lengths(longer).target))
        )
        mend = next((f"use sequence_length {longer}, or fewer ranks" for longer in fitting), None)
        yield Problem(
            problem.path,
            f"cannot split the {target} tokens that t5 predicts of sequence_length {length}; "
            f"{mend or 'use fewer ranks'}",
        )
