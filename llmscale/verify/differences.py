"""How far a rank's tensors are from the reference's, shard by shard."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from llmscale.models.huggingface import describe
from llmscale.models.megatron import tensor_group
from llmscale.parallel.world import place_in_layout
from llmscale.training.megatron_engine import MegatronEngine

Value = Callable[[torch.nn.Parameter], Tensor]


@dataclass(frozen=True)
class Difference:
    """One shard against the reference.

    ``position`` counts layers from the input on. ``difference`` and ``scale`` are the largest
    absolute values of the difference and of the reference's shard.
    """

    step: int
    position: int
    what: str
    tensor: str
    rank: int
    place: str
    difference: float
    scale: float


def parameter_value(parameter: torch.nn.Parameter) -> Tensor:
    """The weights themselves."""
    return parameter.detach().float()


def gradient_value(parameter: torch.nn.Parameter) -> Tensor:
    """The gradient that the optimizer will see, before clipping."""
    return parameter.main_grad.detach().float()  # type: ignore[attr-defined]


def complete_gradients(engine: MegatronEngine) -> None:
    """Gives every rank whole gradients, where a distributed optimizer left each a part."""
    if not engine.settings.distributed:
        return
    for chunk in engine.chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


def whole_values(engine: MegatronEngine, value: Value) -> dict[str, Tensor]:
    """All of a model's values by Hugging Face names, at one rank."""
    found: dict[str, Tensor] = {}
    for chunk in engine.chunks:
        for _, parameter, weight in describe(chunk, engine.architecture, engine.vocabulary):
            whole = weight.form.join([value(parameter)])
            found.update(zip(weight.names, (t.contiguous().clone() for t in whole), strict=True))
    return found


def differences(
    engine: MegatronEngine, reference: Mapping[str, Tensor], value: Value, step: int, what: str
) -> list[Difference]:
    """Each of this rank's shards against the same shard of the reference."""
    found = []
    for chunk in engine.chunks:
        for name, parameter, weight in describe(chunk, engine.architecture, engine.vocabulary):
            group = tensor_group(parameter)
            whole = [reference[name] for name in weight.names]
            expected = weight.form.split(whole, group.rank(), group.size())
            apart = (value(parameter) - expected).abs()
            found.append(
                Difference(
                    step,
                    _position(name, engine.architecture.all_layers),
                    what,
                    " + ".join(weight.names),
                    dist.get_rank(),
                    _place(group.size() > 1 and getattr(parameter, "tensor_model_parallel", False)),
                    float(apart.nan_to_num(torch.inf).max()),
                    float(expected.abs().max()),
                )
            )
    return found


def _position(name: str, layers: int) -> int:
    if name.startswith("decoder.layers."):
        return int(name.split(".")[2]) + 1
    return 0 if name.startswith("embedding.") else layers + 1


def _place(sliced: bool) -> str:
    """This rank in the layout's words, and whether it holds a slice or the whole tensor."""
    words = ", ".join(f"{name} rank {number}" for name, number in place_in_layout().items())
    return f"{'slice' if sliced else 'whole'} at {words}"
