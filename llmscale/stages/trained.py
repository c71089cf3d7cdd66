"""What all stages that train say of how, and what keeps them from it."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import SerializerFunctionWrapHandler, model_serializer

from llmscale.clusters.base import ClusterSettings, Task
from llmscale.clusters.devices import require_engine
from llmscale.models.architecture import Architecture
from llmscale.parallel.layout import Layout
from llmscale.settings import NOT_IDENTITY, Problem, under
from llmscale.stages.base import Stage
from llmscale.training.settings import (
    Batch,
    Checkpointing,
    EngineName,
    Health,
    Optimizer,
    Precision,
    Recompute,
    Validation,
    Zero,
)


class TrainedStage(Stage):
    """A stage that trains a model, and leaves checkpoints of it."""

    engine: EngineName = "megatron"
    zero: Annotated[Zero, NOT_IDENTITY] = Zero()
    parallel: Annotated[Layout, NOT_IDENTITY] = Layout()
    batch: Batch
    optimizer: Optimizer
    precision: Precision = "fp32"
    recompute: Annotated[Recompute, NOT_IDENTITY] = "none"
    checkpoint: Checkpointing = Checkpointing()
    validation: Validation = Validation()
    health: Health = Health()

    product: ClassVar[str] = "hf"
    checkpointed: ClassVar[str] = ""
    """The model's folder in a checkpoint, where there are several."""
    about: ClassVar[str]
    """The file in the stage's folder that says what its data are, and that they are whole."""

    @model_serializer(mode="wrap")
    def _what_before_how(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain = dump(self)
        how = TrainedStage.model_fields.keys() - Stage.model_fields.keys()
        return dict(sorted(plain.items(), key=lambda item: item[0] in how))

    def imports(self) -> tuple[str, ...]:
        own = ("llmscale.training.deepspeed_engine",) if self.engine == "deepspeed" else ()
        return (*super().imports(), *own)

    def require_packages(self) -> None:
        """Checks that the packages of its engines are here.

        Raises:
            MachineError: if one is not.
        """
        require_engine(self.engine)

    def training_problems(
        self, architecture: Architecture, cluster: ClusterSettings, sequence_length: int | None
    ) -> Iterator[Problem]:
        """What of layout, batch, engine and precision does not fit the model or the cluster."""
        if architecture.scored and self.kind != "reward":
            yield Problem(
                ("start_from",),
                "is a model that scores texts, and does not go on from one; use what it was "
                "trained from",
            )
        own, *others = self.layouts(cluster.ranks)
        ranks = cluster.ranks - sum(other.model_ranks * (other.data or 1) for other in others)
        misfits = list(architecture.layout_problems(self.parallel, sequence_length))
        if not others:
            misfits += own.problems(ranks=ranks)
        elif ranks >= own.model_ranks:
            misfits += own.problems(ranks=ranks, whose="what placement leaves of the cluster")
        yield from under("parallel", misfits)
        if not misfits:
            data_ranks = own.data_ranks(ranks)
            yield from under("batch", self._batch_problems(data_ranks))
        yield from self.engine_problems(architecture, cluster)

    def engine_problems(
        self, architecture: Architecture, cluster: ClusterSettings
    ) -> Iterator[Problem]:
        """What the engine lacks for the stage's settings."""
        if self.engine == "deepspeed":
            yield from self._deepspeed_problems(architecture)
        else:
            yield from self._megatron_problems(architecture, cluster)

    def _batch_problems(self, data_ranks: int) -> Iterator[Problem]:
        """What stops the global batch from being split over so many copies of the model."""
        return self.batch.problems(
            data_ranks=data_ranks,
            pipeline=self.parallel.pipeline,
            virtual_pipeline=self.parallel.virtual_pipeline,
        )

    def _megatron_problems(
        self, architecture: Architecture, cluster: ClusterSettings
    ) -> Iterator[Problem]:
        if self.zero != Zero():
            yield Problem(
                ("zero",), "engine megatron has no ZeRO; set engine: deepspeed, or remove it"
            )
        if self.precision == "fp8" and cluster.device == "cpu":
            yield Problem(("precision",), "fp8 needs a GPU, but cluster.device is cpu; use bf16")
        elif self.precision == "fp8" and architecture.traits.objective != "causal":
            yield Problem(
                ("precision",),
                f"fp8 needs layers of Transformer Engine, which {architecture.family} does not "
                "have here; use bf16",
            )

    def _deepspeed_problems(self, architecture: Architecture) -> Iterator[Problem]:
        if architecture.experts:
            yield Problem(
                ("engine",),
                f"deepspeed does not balance the experts of {architecture.family}; use megatron",
            )
        if self.optimizer.distributed:
            yield Problem(
                ("optimizer", "distributed"), "is engine megatron's; use zero: {stage: 1}"
            )
        split = next(
            (
                d
                for d in ("tensor", "pipeline", "context", "expert")
                if getattr(self.parallel, d) > 1
            ),
            None,
        )
        if split is not None:
            yield Problem(
                ("parallel", split),
                "engine deepspeed splits a model by zero alone; remove it, or use engine megatron",
            )
        if self.precision not in ("fp32", "bf16"):
            yield Problem(
                ("precision",), f"engine deepspeed has no {self.precision} here; use bf16 or fp32"
            )
        if self.recompute == "selective":
            yield Problem(
                ("recompute",), "engine deepspeed has full recompute alone; use full or none"
            )
        yield from under("zero", self.zero.problems())

    def layouts(self, ranks: int) -> list[Layout]:
        """Of the groups that the ranks form: that of the trained model, then any others'."""
        return [self.parallel]

    def training_task(self, cluster: ClusterSettings) -> Task:
        """The start of all ranks."""
        return Task(
            "train",
            cluster.ranks,
            cluster.nodes,
            on_device=True,
            neighbours=self.parallel.tensor,
            fewer=tuple(self._fewer_ranks(cluster.ranks)),
        )

    def _fewer_ranks(self, ranks: int) -> Iterator[int]:
        """Smaller numbers of ranks that train the same batches: with fewer copies of the model."""
        if len(self.layouts(ranks)) > 1:
            return
        for data in range(self.parallel.data_ranks(ranks) - 1, 0, -1):
            layout = self.parallel.model_copy(update={"data": data})
            fewer = layout.model_ranks * data
            if not [*layout.problems(ranks=fewer), *self._batch_problems(data)]:
                yield fewer
