"""Relative position bias (Raffel et al. 2020, section 2.1), as T5 adds it to its scores."""

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from llmscale.models.architecture import Architecture


def relative_buckets(
    distances: Tensor, *, causal: bool, buckets: int, largest_distance: int
) -> Tensor:
    """The bucket of each distance from a query's place to a key's, in the distances' shape.

    Half of a direction's buckets hold one distance each, the others logarithmically more, up
    to ``largest_distance``. Under a causal mask only keys before the query have buckets.
    """
    first = torch.zeros_like(distances)
    if causal:
        distances = (-distances).clamp(min=0)
    else:
        buckets //= 2
        first = (distances > 0) * buckets
        distances = distances.abs()
    exact = buckets // 2
    ratio = torch.log(distances.float() / exact) / math.log(largest_distance / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return first + torch.where(distances < exact, distances, far)


class RelativeBias(torch.nn.Module):
    """What all layers of a stack add to their scores: a table ``[buckets, own heads]``.

    Every model chunk holds a copy, whether it has layers of the stack or not. Copies stay
    equal since megatron-core sums the gradients of ``pipeline_parallel`` parameters over the
    pipeline; the distributed optimizer cuts them alike (``shared_embedding``), and the
    gradient's norm counts only the first (``shared``).
    """

    def __init__(
        self, architecture: Architecture, config: Any, *, causal: bool, first: bool
    ) -> None:
        super().__init__()
        self.causal, self.first = causal, first
        self.largest_distance = architecture.relative_distance
        heads = architecture.attention_heads // config.tensor_model_parallel_size
        shape = (architecture.relative_buckets, heads)
        self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 1, 1)
        several = config.pipeline_model_parallel_size > 1
        marks = {"pipeline_parallel": several, "shared_embedding": several, "shared": not first}
        for name, mark in marks.items():
            setattr(self.weight, name, mark)

    def forward(self, places_s: Tensor, keys: int) -> Tensor:
        """The bias ``[1, own heads, s, keys]`` of queries at these places."""
        distances = torch.arange(keys, device=places_s.device) - places_s[:, None]
        found = relative_buckets(
            distances,
            causal=self.causal,
            buckets=self.weight.shape[0],
            largest_distance=self.largest_distance,
        )
        return torch.nn.functional.embedding(found, self.weight).permute(2, 0, 1)[None]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The table as one tensor of the checkpoint, whose other copies are replicas."""
        key = f"{prefix}weight"
        data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        replica = (0 if self.first else 1, 0, data_rank)
        sharded = make_tp_sharded_tensor_for_checkpoint(
            self.weight, key, tp_axis=1, replica_id=replica
        )
        return {key: sharded}
