"""How long the parts of a model take on one GPU for one micro-batch, operator by operator."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from llmscale.planning.hardware import Number
from llmscale.planning.kernels import Machine
from llmscale.planning.setup import Setup

IMBALANCE = 1.25
"""Tokens of the busiest expert rank over the mean, with a balance loss: GShard's capacity factor
(Lepikhin et al. 2021, section 3.2); the step waits for that rank."""


class Product(NamedTuple):
    """A matrix product of the forward pass: ``rows x depth`` by ``depth x columns``."""

    rows: float
    columns: float
    depth: float


@dataclass(frozen=True)
class PassTime:
    """Seconds of one micro-batch on one GPU.

    ``recompute`` is what the backward pass does again of the forward pass.
    """

    forward: float = 0.0
    backward: float = 0.0
    recompute: float = 0.0

    def __add__(self, other: "PassTime") -> "PassTime":
        return PassTime(
            self.forward + other.forward,
            self.backward + other.backward,
            self.recompute + other.recompute,
        )

    def times(self, number: float) -> "PassTime":
        """Of so many alike."""
        return PassTime(self.forward * number, self.backward * number, self.recompute * number)


def products(setup: Setup, rows: float) -> Iterator[Product]:
    """The linear layers of one Transformer layer on one rank, experts among them."""
    model, t = setup.architecture, setup.tensor
    hidden, width = model.hidden_size, model.attention_heads * model.head
    keys = model.groups * model.head
    yield Product(rows, (width + 2 * keys) / t, hidden)
    yield Product(rows, hidden, width / t)
    inputs = (2 if model.gated_ffn else 1) * model.ffn
    if model.experts is None:
        yield Product(rows, inputs / t, hidden)
        yield Product(rows, hidden, model.ffn / t)
        return
    # Experts split among ranks are whole there, and see the tokens of their tensor ranks' parts.
    held = model.experts / setup.expert
    routed = IMBALANCE * rows / t * model.experts_per_token / held
    for _ in range(round(held)):
        yield Product(routed, inputs, hidden)
        yield Product(routed, hidden, model.ffn)


def layer_time(setup: Setup, machine: Machine, *, decoder: bool = False) -> PassTime:
    """One Transformer layer; ``decoder``: t5's, with cross attention, over its target tokens."""
    length = float(setup.target_length if decoder else setup.sequence_length)
    rows = setup.micro_batch * length / setup.context
    linear, seen = PassTime(), list(products(setup, rows))
    if decoder:
        model = setup.architecture
        width = model.attention_heads * model.head / setup.tensor
        sources = setup.rank_tokens
        seen += [
            Product(rows, width, model.hidden_size),
            Product(sources, 2 * width, model.hidden_size),
            Product(rows, model.hidden_size, width),
        ]
    for product in seen:
        linear += _linear(setup, machine, product)
    core = _attention(setup, machine, length, length, causal=_causal(setup, decoder))
    if decoder:
        core += _attention(setup, machine, length, setup.sequence_length, causal=False)
    small = _elementwise(setup, machine, rows)
    whole = linear + core + small
    again = {
        "none": 0.0,
        "selective": core.forward,
        "operators": linear.forward / 2 + small.forward,
        "full": whole.forward,
    }[setup.recompute]
    return replace(whole, recompute=again * setup.recomputed_layers)


def _causal(setup: Setup, decoder: bool) -> bool:
    return decoder or setup.architecture.traits.objective == "causal"


def _linear(setup: Setup, machine: Machine, product: Product) -> PassTime:
    rows, columns, depth = product
    number = setup.number
    common = {"number": number, "scaling": setup.scaling}
    forward = machine.product(rows, columns, depth, **common)  # type: ignore[arg-type]
    inputs = machine.product(rows, depth, columns, **common)  # type: ignore[arg-type]
    weights = machine.product(
        depth,
        columns,
        rows,
        output_bytes=2 * setup.gradient_bytes,
        **common,  # type: ignore[arg-type]
    )
    if number in ("fp8", "fp4"):
        passes = {"tensor": 1.0, "row": 2.0, "block": 2.0}[setup.scaling]
        forward += machine.move(4.0 * rows * depth * passes, 1)
        inputs += machine.move(4.0 * rows * columns * passes, 1)
    return PassTime(forward, inputs + weights)


def _attention(
    setup: Setup, machine: Machine, queries: float, keys: float, *, causal: bool
) -> PassTime:
    model = setup.architecture
    pairs = setup.micro_batch * queries * keys / setup.context
    if causal and setup.kernels != "unfused":
        pairs /= 2
    heads = model.attention_heads / setup.tensor
    number: Number = "fp32" if setup.number == "fp32" else "half"
    forward, backward = machine.attention(pairs, heads, model.head, setup.kernels, number)
    return PassTime(forward, backward)


def _elementwise(setup: Setup, machine: Machine, rows: float) -> PassTime:
    """Norms, residual sums, dropout, positions and activations: what only moves memory.

    In bytes a token, forward, in 16 bits: a norm reads and writes its input (4 h), twice; a
    residual sum reads two and writes one, with dropout also a mask (6 to 7 h), twice; the
    activation reads and writes the width of the feed-forward layer, positions read and write
    queries and keys. Backward, a norm and an activation also read what was kept, and a sum's
    gradient only passes through: 1.5 times as much.
    """
    model = setup.architecture
    element = setup.weight_bytes
    hidden = model.hidden_size / (setup.tensor if setup.sequence_parallel else 1)
    split = model.ffn * (3 if model.gated_ffn else 2)
    split *= model.experts_per_token if model.experts else 1
    if model.rotary:
        split += 2 * (model.attention_heads + model.groups) * model.head
    moved = rows * element * (hidden * (10 + setup.dropout) + split / setup.tensor)
    kernels = 6
    if not setup.fused:
        moved *= machine.constants.separate_traffic
        kernels *= 3
    forward = machine.move(moved, kernels)
    return PassTime(forward, machine.move(1.5 * moved, 2 * kernels))


def vocabulary_time(setup: Setup, machine: Machine) -> PassTime:
    """The output layer and its loss: a product in 16 bits, and passes over logits in fp32.

    Forward the logits are read in 16 bits, written in 32 and read twice (maximum, sum); backward
    they are read and written once.
    """
    model, t = setup.architecture, setup.tensor
    if model.scored:
        return PassTime()
    rows = setup.rank_tokens
    if model.family == "t5":
        rows = setup.micro_batch * setup.target_length / setup.context
    columns = model.padded_vocabulary(setup.vocabulary, t) / t
    number: Number = "fp32" if setup.number == "fp32" else "half"
    forward = machine.product(rows, columns, model.hidden_size, number)
    backward = machine.product(rows, model.hidden_size, columns, number) + machine.product(
        model.hidden_size, columns, rows, number, output_bytes=2 * setup.gradient_bytes
    )
    logits = rows * columns * (1.0 if setup.fused else machine.constants.separate_traffic)
    return PassTime(
        forward + machine.move(14.0 * logits, 4), backward + machine.move(8.0 * logits, 3)
    )


def embedding_time(setup: Setup, machine: Machine) -> PassTime:
    """Rows of the table read and written; their gradients summed into it."""
    moved = setup.rank_tokens * setup.architecture.hidden_size * setup.weight_bytes
    return PassTime(machine.move(2 * moved, 2), machine.move(3 * moved, 2))
