"""What the weights of all families have in common."""

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

from llmscale.models.architecture import Architecture
from llmscale.models.score_head import HEAD, initial_std
from llmscale.models.shards import Form, QueryKeyValue, Replicated, Split, Stacked, Vocabulary
from llmscale.models.weights import Weight

TRANSFORMER_ENGINE_NAMES = {
    "linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    "self_attention.input_layernorm": "input_layernorm",
}
"""Where Transformer Engine's layers keep the norms that others have beside."""

GROUPED_EXPERTS = re.compile(r"\.experts\.(linear_fc[12])\.weight(\d+)$")
"""How Transformer Engine's experts are named, which are computed together."""


@dataclass(frozen=True)
class Rules(ABC):
    """Finds a parameter's description by its Megatron name.

    ``vocabulary`` and ``padded`` are the rows of the embedding in the Hugging Face form, and
    over all tensor-parallel ranks.
    """

    architecture: Architecture
    vocabulary: int
    padded: int

    def weight(self, name: str) -> Weight:
        """The description of a parameter; layers and experts count over the whole model."""
        for theirs, ours in TRANSFORMER_ENGINE_NAMES.items():
            name = name.replace(theirs, ours)
        name = GROUPED_EXPERTS.sub(r".experts.local_experts.\2.\1.weight", name)
        if name == "output_layer.weight" and self.architecture.scored:
            heads, hidden = len(self.architecture.scored), self.architecture.hidden_size
            return self.replicated(HEAD, (heads, hidden), initial_std(hidden))
        if name.startswith("decoder.layers."):
            _, _, layer, part = name.split(".", 3)
            module, kind = part.rsplit(".", 1)
            return self.layer(int(layer), module, kind)
        return self.outer(name)

    @abstractmethod
    def layer(self, number: int, module: str, kind: str) -> Weight:
        """A parameter of a layer, ``kind`` being weight or bias."""

    @abstractmethod
    def outer(self, name: str) -> Weight:
        """A parameter that belongs to no layer."""

    @property
    def output_std(self) -> float:
        """The spread of projections into the residual stream (Radford et al. 2019, section 2.3)."""
        return self.architecture.initial_std / math.sqrt(2 * self.architecture.layers)

    def table(self, name: str, std: float | None = None) -> Weight:
        """An embedding or output table, a row a token."""
        form = Vocabulary(self.vocabulary, self.padded)
        shape = (self.vocabulary, self.architecture.hidden_size)
        return Weight((name,), (shape,), form, std or self.architecture.initial_std)

    def norm(self, prefix: str, kind: str, size: int | None = None) -> Weight:
        """A norm's scale or shift."""
        std = None if kind == "weight" else 0.0
        shape = (size or self.architecture.hidden_size,)
        return Weight((f"{prefix}.{kind}",), (shape,), Replicated(), std)

    def replicated(self, name: str, shape: tuple[int, ...], std: float) -> Weight:
        """A tensor that every rank holds whole."""
        return Weight((name,), (shape,), Replicated(), std)

    def columns(
        self, name: str, kind: str, outputs: int, inputs: int, std: float | None = None
    ) -> Weight:
        """A linear layer whose outputs are split."""
        return self.linear((f"{name}.{kind}",), kind, (outputs,), inputs, Split(0), std)

    def rows(
        self, name: str, kind: str, outputs: int, inputs: int, std: float | None = None
    ) -> Weight:
        """A linear layer whose inputs are split, into the residual stream."""
        form: Form = Replicated() if kind == "bias" else Split(1)
        std = std or self.output_std
        return self.linear((f"{name}.{kind}",), kind, (outputs,), inputs, form, std)

    def gate_and_up(
        self,
        names: tuple[str, str],
        kind: str,
        outputs: int,
        inputs: int,
        std: float | None = None,
    ) -> Weight:
        """Two linear layers side by side, as in SwiGLU."""
        both = (f"{names[0]}.{kind}", f"{names[1]}.{kind}")
        return self.linear(both, kind, (outputs, outputs), inputs, Stacked(), std)

    def query_key_value(self, names: tuple[str, str, str], kind: str) -> Weight:
        """Three linear layers, interleaved by key-value head."""
        a = self.architecture
        sizes = (a.attention_heads * a.head, a.groups * a.head, a.groups * a.head)
        three = tuple(f"{name}.{kind}" for name in names)
        return self.linear(three, kind, sizes, a.hidden_size, QueryKeyValue(a.groups, a.head))

    def linear(
        self,
        names: tuple[str, ...],
        kind: str,
        outputs: tuple[int, ...],
        inputs: int,
        form: Form,
        std: float | None = None,
    ) -> Weight:
        """Linear layers' weights, ``[outputs, inputs]``, or their biases."""
        if kind == "bias":
            return Weight(names, tuple((size,) for size in outputs), form, 0.0)
        shapes = tuple((size, inputs) for size in outputs)
        return Weight(names, shapes, form, self.architecture.initial_std if std is None else std)
