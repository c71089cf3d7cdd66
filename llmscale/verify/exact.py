"""One rank of a recipe's true layout, built without memory or communication, and counted.

The module tree is megatron-core's own, at the recipe's true number of ranks, on PyTorch's
meta device with a process group that only knows its size.
"""

import math
from dataclasses import dataclass

from megatron.core import parallel_state

from llmscale.errors import RecipeError, StageError
from llmscale.models.huggingface import describe
from llmscale.models.megatron import build_chunks, inner_model, tensor_group
from llmscale.models.shards import Vocabulary
from llmscale.parallel.world import imagined_world, place_in_layout, process_groups
from llmscale.stages.pretrain import Pretrain

MOMENT_BYTES, FP32_BYTES = 8, 4
"""AdamW's two moments, and a gradient or a main copy of a weight, in bytes a parameter."""


@dataclass(frozen=True)
class HeldTensor:
    """A parameter as one rank holds it.

    ``parts`` is over how many ranks its whole is split, ``copies`` on how many data and context
    ranks each part is, and ``whole`` its elements without padding, over all experts like it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: int
    copies: int
    whole: int

    @property
    def elements(self) -> int:
        """On this rank."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class HeldStage:
    """What one rank of a pipeline stage holds."""

    number: int
    layers: tuple[int, ...]
    tensors: tuple[HeldTensor, ...]

    @property
    def parameters(self) -> int:
        """On one rank."""
        return sum(tensor.elements for tensor in self.tensors)


@dataclass(frozen=True)
class ExactRank:
    """A rank of the true layout, and one rank of each pipeline stage."""

    rank: int
    ranks: int
    place: dict[str, int]
    own: HeldStage
    stages: tuple[HeldStage, ...]
    total_parameters: int
    expected_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


def exact_rank(stage: Pretrain, vocabulary: int, rank: int, ranks: int) -> ExactRank:
    """Builds a rank of a training stage at its true size, and one rank of every stage.

    Raises:
        RecipeError: if there is no such rank.
        StageError: if the stages together are not the whole model.
    """
    if not 0 <= rank < ranks:
        raise RecipeError(f"--exact-rank: there is no rank {rank}; use 0 to {ranks - 1}")
    own, within = divmod(rank, ranks // stage.parallel.pipeline)
    places, stages = [], []
    for number in range(stage.parallel.pipeline):
        counterpart = number * (ranks // stage.parallel.pipeline) + within
        with imagined_world(counterpart, ranks), process_groups(stage.parallel, seed=0):
            places.append(place_in_layout())
            stages.append(_held(stage, vocabulary, number))
    whole: dict[str, int] = {}
    for held in stages:
        whole |= {tensor.name: tensor.whole for tensor in held.tensors if tensor.whole}
    _require_all_layers(stages, stage.architecture().all_layers)
    elements = stages[own].parameters
    low = stage.precision != "fp32"
    state = MOMENT_BYTES + (FP32_BYTES if low else 0)
    return ExactRank(
        rank=rank,
        ranks=ranks,
        place=places[own],
        own=stages[own],
        stages=tuple(stages),
        total_parameters=sum(whole.values()),
        expected_parameters=stage.architecture().parameters(vocabulary),
        weight_bytes=elements * (2 if low else FP32_BYTES),
        gradient_bytes=elements * FP32_BYTES,
        optimizer_bytes=sum(
            state * -(-t.elements // (t.copies if stage.optimizer.distributed else 1))
            for t in stages[own].tensors
        ),
    )


def _require_all_layers(stages: list[HeldStage], layers: int) -> None:
    built = sorted(layer for held in stages for layer in held.layers)
    if built != list(range(layers)):
        raise StageError(
            f"megatron-core builds {len(built)} layers of {layers} at this layout; "
            "lay them out by layers_per_stage"
        )


def _held(stage: Pretrain, vocabulary: int, number: int) -> HeldStage:
    architecture = stage.architecture()
    chunks = build_chunks(
        architecture, vocabulary, stage.parallel, stage.precision, stage.recompute, "meta"
    )
    layers: list[int] = []
    tensors: list[HeldTensor] = []
    for chunk in chunks:
        layers += [layer.layer_number - 1 for layer in inner_model(chunk).decoder.layers]
        for _, parameter, weight in describe(chunk, architecture, vocabulary):
            expert = not getattr(parameter, "allreduce", True)
            split = getattr(parameter, "tensor_model_parallel", False)
            parts = tensor_group(parameter).size() if split else 1
            alike = parallel_state.get_expert_model_parallel_world_size() if expert else 1
            padding = 0
            if isinstance(weight.form, Vocabulary):
                rows = weight.form.padded_rows - weight.form.rows
                padding = rows * math.prod(parameter.shape[1:])
            tensors.append(
                HeldTensor(
                    name=" + ".join(weight.names),
                    shape=tuple(parameter.shape),
                    dtype=str(parameter.dtype).removeprefix("torch."),
                    parts=parts * alike,
                    copies=_copies(expert),
                    whole=(parameter.numel() * parts - padding) * alike,
                )
            )
    return HeldStage(number, tuple(layers), tuple(tensors))


def _copies(expert: bool) -> int:
    if expert:
        return int(parallel_state.get_expert_data_parallel_world_size())
    return int(parallel_state.get_data_parallel_world_size(with_context_parallel=True))
