"""What keeps a stage that trains from its layout, batch or precision, whatever it trains."""

from collections.abc import Iterator
from typing import Protocol

from llmscale.clusters.base import ClusterSettings, Task
from llmscale.models.architecture import Architecture
from llmscale.parallel.layout import Layout
from llmscale.settings import Problem, under
from llmscale.training.settings import (
    Batch,
    EngineName,
    Optimizer,
    Precision,
    Recompute,
    Zero,
)


def layout_problems(
    architecture: Architecture,
    layout: Layout,
    batch: Batch,
    cluster: ClusterSettings,
    sequence_length: int | None,
) -> Iterator[Problem]:
    """What of a layout and a batch does not fit the model or the cluster."""
    misfits = [
        *architecture.layout_problems(layout, sequence_length),
        *layout.problems(ranks=cluster.ranks),
    ]
    yield from under("parallel", misfits)
    if not misfits:
        yield from under("batch", batch_problems(batch, layout, layout.data_ranks(cluster.ranks)))


def batch_problems(batch: Batch, layout: Layout, data_ranks: int) -> Iterator[Problem]:
    """What stops the global batch from being split over so many copies of the model."""
    return batch.problems(
        data_ranks=data_ranks, pipeline=layout.pipeline, virtual_pipeline=layout.virtual_pipeline
    )


class WithEngine(Protocol):
    """What a stage says of its engine."""

    @property
    def engine(self) -> EngineName: ...
    @property
    def zero(self) -> Zero: ...
    @property
    def optimizer(self) -> Optimizer: ...
    @property
    def parallel(self) -> Layout: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def recompute(self) -> Recompute: ...


def engine_problems(
    stage: WithEngine, architecture: Architecture, cluster: ClusterSettings
) -> Iterator[Problem]:
    """What an engine does not offer, or what a precision needs that is not there."""
    if stage.engine == "deepspeed":
        yield from _deepspeed_problems(stage, architecture)
    elif stage.zero != Zero():
        yield Problem(("zero",), "engine megatron has no ZeRO; set engine: deepspeed, or remove it")
    elif stage.precision == "fp8" and cluster.device == "cpu":
        yield Problem(("precision",), "fp8 needs a GPU, but cluster.device is cpu; use bf16")
    elif stage.precision == "fp8" and architecture.traits.objective != "causal":
        yield Problem(
            ("precision",),
            f"fp8 needs layers of Transformer Engine, which {architecture.family} does not "
            "have here; use bf16",
        )


def _deepspeed_problems(stage: WithEngine, architecture: Architecture) -> Iterator[Problem]:
    if architecture.experts:
        yield Problem(
            ("engine",),
            f"deepspeed does not balance the experts of {architecture.family}; use megatron",
        )
    if stage.optimizer.distributed:
        yield Problem(("optimizer", "distributed"), "is engine megatron's; use zero: {stage: 1}")
    split = next(
        (d for d in ("tensor", "pipeline", "context", "expert") if getattr(stage.parallel, d) > 1),
        None,
    )
    if split is not None:
        yield Problem(
            ("parallel", split),
            "engine deepspeed splits a model by zero alone; remove it, or use engine megatron",
        )
    if stage.precision not in ("fp32", "bf16"):
        yield Problem(
            ("precision",), f"engine deepspeed has no {stage.precision} here; use bf16 or fp32"
        )
    if stage.recompute == "selective":
        yield Problem(("recompute",), "engine deepspeed has full recompute alone; use full or none")
    yield from under("zero", stage.zero.problems())


def training_task(layout: Layout, batch: Batch, cluster: ClusterSettings) -> Task:
    """The start of all ranks."""
    return Task(
        "train",
        cluster.ranks,
        cluster.nodes,
        on_device=True,
        neighbours=layout.tensor,
        fewer=tuple(_fewer_ranks(layout, batch, cluster.ranks)),
    )


def _fewer_ranks(layout: Layout, batch: Batch, ranks: int) -> Iterator[int]:
    """Smaller numbers of ranks that train the same batches: with fewer copies of the model."""
    for data in range(layout.data_ranks(ranks) - 1, 0, -1):
        smaller = layout.model_copy(update={"data": data})
        fewer = smaller.model_ranks * data
        misfits = [*smaller.problems(ranks=fewer), *batch_problems(batch, smaller, data)]
        if not misfits:
            yield fewer
