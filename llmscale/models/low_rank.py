"""Low-rank adapters (Hu et al. 2021, LoRA) beside the linear layers of a Megatron model.

A Megatron layer may hold several Hugging Face weights side by side. Each of them has its own
pair of factors, so that the mathematics is that of PEFT on the model of transformers. Beside a
weight whose outputs are split over tensor ranks A is whole and B split; where its inputs are
split, it is the other way round.

Shape legend: s tokens, b samples, i inputs, o outputs of a weight, r rank; under sequence
parallelism s counts this rank's own tokens beside the whole residual stream.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.layers import RowParallelLinear
from torch import Tensor, nn
from torch.nn.functional import linear

from llmscale.models.families.base import Rules
from llmscale.models.megatron import LOW_RANK
from llmscale.models.shards import Form, Replicated, Split, Transposed
from llmscale.models.weights import Weight, low_rank_start

LINEARS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""A layer's modules that can have pairs."""


@dataclass(frozen=True)
class Factors:
    """Where the pair of one Hugging Face weight stands, and how each factor is sharded.

    Attributes:
        name: the weight's layer, such as ``model.layers.0.self_attn.q_proj``.
        transposed: whether the weight is stored as ``[i, o]``.
    """

    name: str
    inputs: int
    outputs: int
    down_form: Form
    up_form: Form
    transposed: bool

    @property
    def target(self) -> str:
        """What a recipe's ``targets`` call it."""
        return self.name.rpartition(".")[2]

    @property
    def down_name(self) -> str:
        """Of A, in a PEFT folder."""
        return f"base_model.model.{self.name}.lora_A.weight"

    @property
    def up_name(self) -> str:
        """Of B, in a PEFT folder."""
        return f"base_model.model.{self.name}.lora_B.weight"


def layer_factors(rules: Rules, layer: int) -> Iterator[Factors]:
    """Every weight of a layer that can have a pair; layers count over the whole model."""
    for module in LINEARS:
        yield from factors_of(rules.layer(layer, module, "weight"))


def factors_of(weight: Weight) -> list[Factors]:
    """What is beside each Hugging Face weight that a Megatron parameter is put together from."""
    form, transposed = weight.form, isinstance(weight.form, Transposed)
    if isinstance(form, Transposed):
        form = form.form
    if form == Split(1):
        forms: tuple[Form, Form] = Split(1), Replicated()
    else:
        # Of several weights each one's own rows lie in order, so that its B is cut evenly.
        forms = Replicated(), form if len(weight.names) == 1 else Split(0)
    found = []
    for name, shape in zip(weight.names, weight.shapes, strict=True):
        outputs, inputs = reversed(shape) if transposed else shape
        found.append(Factors(name.removesuffix(".weight"), inputs, outputs, *forms, transposed))
    return found


def _tensor_place() -> tuple[int, int]:
    group = parallel_state.get_tensor_model_parallel_group()
    return group.rank(), group.size()


@dataclass(frozen=True)
class Factor:
    """A or B of a pair: its name in a PEFT folder, this rank's part of it, and its form."""

    name: str
    parameter: nn.Parameter
    form: Form

    def whole(self) -> Tensor:
        """The factor joined over its tensor group; collective there."""
        own = self.parameter.detach()
        if isinstance(self.form, Replicated):
            return own
        group = parallel_state.get_tensor_model_parallel_group()
        shards = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(shards, own.contiguous(), group=group)
        return self.form.join(shards)[0]


class Pair(nn.Module):
    """A ``[r, i]`` and B ``[o, r]`` of one weight, as this rank holds them; not yet set."""

    def __init__(self, factors: Factors, beside: Any, rank: int, alpha: float) -> None:
        super().__init__()
        self.factors = factors
        self.rank, self.scale = rank, alpha / rank
        self._inputs_split = isinstance(beside, RowParallelLinear)
        self._sequence = beside.config.sequence_parallel
        self.down = self._factor((rank, factors.inputs), factors.down_form, beside.weight)
        self.up = self._factor((factors.outputs, rank), factors.up_form, beside.weight)

    def _factor(self, shape: tuple[int, int], form: Form, like: Tensor) -> nn.Parameter:
        own = form.split([torch.empty(shape, device="meta")], *_tensor_place())
        parameter = nn.Parameter(torch.empty(own.shape, device=like.device, dtype=like.dtype))
        if isinstance(form, Replicated):
            # megatron-core then sums gradients, each of a rank's own tokens.
            parameter.sequence_parallel = self._sequence  # type: ignore[attr-defined]
        else:
            dimension = form.dimension if isinstance(form, Split) else 0
            set_tensor_model_parallel_attributes(parameter, True, dimension, 1)
        return parameter

    def forward(self, inputs_sbi: Tensor) -> Tensor:
        """``alpha / r B A x``: ``[s, b, o]``, of this rank's outputs where those are split."""
        low_sbr = linear(inputs_sbi, self.down)
        if self._inputs_split:
            low_sbr = (
                reduce_scatter_to_sequence_parallel_region(low_sbr)
                if self._sequence
                else reduce_from_tensor_model_parallel_region(low_sbr)
            )
        elif self._sequence:
            low_sbr = gather_from_sequence_parallel_region(low_sbr)
        else:
            low_sbr = copy_to_tensor_model_parallel_region(low_sbr)
        return linear(low_sbr, self.up) * self.scale

    @torch.no_grad()
    def start(self, seed: int) -> None:
        """Draws A by the seed and its name, and sets B to zero."""
        name, shape = self.factors.down_name, (self.rank, self.factors.inputs)
        whole = low_rank_start(name, shape, seed)
        self.down.copy_(self.factors.down_form.split([whole], *_tensor_place()))
        self.up.zero_()

    def parts(self) -> tuple[Factor, Factor]:
        """A and B."""
        return (
            Factor(self.factors.down_name, self.down, self.factors.down_form),
            Factor(self.factors.up_name, self.up, self.factors.up_form),
        )

    @torch.no_grad()
    def change(self) -> Tensor:
        """``alpha / r B A`` as the weight is stored, whole; collective in the tensor group."""
        down, up = (part.whole() for part in self.parts())
        change = (up @ down) * self.scale
        return change.T if self.factors.transposed else change


class LowRank(nn.Module):
    """The pairs beside one linear layer; adds what they give to what it gives."""

    def __init__(
        self, beside: Any, weight: Weight, targets: Collection[str], rank: int, alpha: float
    ) -> None:
        super().__init__()
        every = factors_of(weight)
        self.pairs = nn.ModuleDict()
        self._places: dict[str, Tensor | None] = {}
        for factors, places in zip(every, _places(weight, every), strict=True):
            if factors.target in targets:
                self.pairs[factors.target] = Pair(factors, beside, rank, alpha)
                self._places[factors.target] = (
                    None if places is None else places.to(beside.weight.device)
                )

    def forward(self, inputs_sbi: Tensor, output_sbo: Tensor) -> Tensor:
        """The layer's output, at each weight's places in it what the weight's pair gives more."""
        for target, pair in self.pairs.items():
            change_sbo, places = pair(inputs_sbi), self._places[target]
            if places is None:
                output_sbo = output_sbo + change_sbo
            else:
                output_sbo = output_sbo.index_add(-1, places, change_sbo)
        return output_sbo


def _places(weight: Weight, every: list[Factors]) -> list[Tensor | None]:
    """Which of this rank's outputs are each weight's; None where there is only one weight."""
    if len(every) == 1:
        return [None]
    owners = [torch.full((factors.outputs,), number) for number, factors in enumerate(every)]
    own = weight.form.split(owners, *_tensor_place())
    return [(own == number).nonzero()[:, 0] for number in range(len(every))]


def put_beside(beside: Any, low_rank: LowRank) -> None:
    """Lets a linear layer give what its pairs give, too."""
    beside.add_module(LOW_RANK, low_rank)
    beside.register_forward_hook(_added)


def _added(
    beside: Any, inputs: tuple[Tensor, ...], result: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    output_sbo, bias = result
    return getattr(beside, LOW_RANK)(inputs[0], output_sbo), bias


def low_rank_pairs(chunks: Iterable[nn.Module]) -> Iterator[Pair]:
    """All pairs of this rank's part of a model."""
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, Pair))
