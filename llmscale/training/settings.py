"""What a recipe says of training, for every kind of stage that trains."""

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from llmscale.settings import (
    NOT_IDENTITY,
    Problem,
    Settings,
    choices,
    divisors,
    nearest,
    nearest_multiples,
    under,
)

Precision = Literal["fp32", "bf16", "fp16", "fp8"]


class Ramp(Settings):
    """A global batch that grows from ``start`` by ``increment``, evenly over ``samples``."""

    start: PositiveInt
    increment: PositiveInt
    samples: PositiveInt

    def problems(self, largest: int, multiple: int, why: str) -> Iterator[Problem]:
        """What keeps the sizes from reaching ``largest`` by multiples of ``multiple``."""
        distance = largest - self.start
        if distance <= 0:
            yield Problem(
                ("start",), f"{self.start} is not below global {largest}; lower it, or remove ramp"
            )
        elif self.start % multiple:
            yield Problem(
                ("start",),
                f"{why} does not divide {self.start}; "
                f"use {nearest_multiples(self.start, multiple)}",
            )
        elif distance % self.increment or self.increment % multiple:
            fitting = [size for size in divisors(distance) if size % multiple == 0]
            cause = (
                f"{self.increment} does not divide global {largest} - start {self.start}"
                if distance % self.increment
                else f"{why} does not divide {self.increment}"
            )
            yield Problem(
                ("increment",), f"{cause}; use {choices(nearest(fitting, self.increment))}"
            )


class Batch(Settings):
    """Samples a step: ``global`` over all ranks, ``micro`` in one forward pass of one rank."""

    global_: PositiveInt = Field(alias="global")
    micro: Annotated[PositiveInt, NOT_IDENTITY] = 1
    ramp: Ramp | None = None

    def size(self, consumed: int) -> int:
        """The global batch of the step before which ``consumed`` samples were read.

        By Megatron-LM's ``--rampup-batch-size``, in whole numbers.
        """
        if self.ramp is None or consumed >= self.ramp.samples:
            return self.global_
        increments = (self.global_ - self.ramp.start) // self.ramp.increment
        grown = consumed * increments // self.ramp.samples
        return self.ramp.start + grown * self.ramp.increment

    def consumed(self, steps: int) -> int:
        """Samples that the first ``steps`` steps read."""
        samples = 0
        for step in range(steps):
            size = self.size(samples)
            if size == self.global_:
                return samples + (steps - step) * size
            samples += size
        return samples

    def problems(
        self, *, data_ranks: int, pipeline: int, virtual_pipeline: int
    ) -> Iterator[Problem]:
        """What stops the global batch from being split evenly."""
        per_pass = self.micro * data_ranks
        if self.global_ % per_pass:
            yield Problem(
                ("global",),
                f"micro {self.micro} x data {data_ranks} = {per_pass} does not divide "
                f"{self.global_}; use {nearest_multiples(self.global_, per_pass)}",
            )
        elif virtual_pipeline > 1 and (self.global_ // per_pass) % pipeline:
            passes = self.global_ // per_pass
            yield Problem(
                ("global",),
                f"{passes} micro-batches a rank are no multiple of pipeline {pipeline}, as the "
                f"interleaved schedule needs; use "
                f"{nearest_multiples(self.global_, per_pass * pipeline)}",
            )
        elif self.ramp is not None:
            why, multiple = f"micro {self.micro} x data {data_ranks}", per_pass
            if virtual_pipeline > 1:
                why, multiple = f"{why} x pipeline {pipeline}", per_pass * pipeline
            why = f"{why} = {multiple}"
            yield from under("ramp", self.ramp.problems(self.global_, multiple, why))


class Optimizer(Settings):
    """AdamW (Loshchilov and Hutter 2019) and its learning-rate schedule."""

    name: Literal["adamw"] = "adamw"
    learning_rate: PositiveFloat
    minimum_learning_rate: NonNegativeFloat = 0.0
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    decay_steps: PositiveInt | None = None
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    gradient_clip: NonNegativeFloat = 1.0
    distributed: bool = False

    def problems(self, steps: int) -> Iterator[Problem]:
        """What does not fit into the number of steps."""
        if self.warmup_steps > steps:
            yield Problem(
                ("warmup_steps",),
                f"{self.warmup_steps} is above steps {steps}; use at most {steps}",
            )
        if self.minimum_learning_rate > self.learning_rate:
            yield Problem(
                ("minimum_learning_rate",),
                f"{self.minimum_learning_rate} is above learning_rate {self.learning_rate}; "
                f"use at most {self.learning_rate}",
            )
        if self.decay_steps is not None and self.schedule != "wsd":
            yield Problem(("decay_steps",), "only schedule wsd has it; remove it")
        elif self.decay_steps is not None and self.decay_steps + self.warmup_steps > steps:
            yield Problem(
                ("decay_steps",),
                f"{self.decay_steps} + warmup_steps {self.warmup_steps} is above steps {steps}; "
                f"{self._shorter_decay(steps)}",
            )

    def _shorter_decay(self, steps: int) -> str:
        left = steps - self.warmup_steps
        return f"use at most {left}" if left > 0 else "lower warmup_steps"


class Checkpointing(Settings):
    """When the whole state is saved, and how many are kept besides the best one."""

    every: Annotated[PositiveInt, NOT_IDENTITY] = 500
    keep: Annotated[PositiveInt, NOT_IDENTITY] = 2
    asynchronous: Annotated[bool, NOT_IDENTITY] = False


class Validation(Settings):
    """On how many samples of each corpus the validation loss is taken, at each checkpoint."""

    samples: PositiveInt = 256


class Health(Settings):
    """When a run that goes wrong stops."""

    nonfinite_steps: Annotated[PositiveInt, NOT_IDENTITY] = 5
    timeout_seconds: Annotated[PositiveFloat, NOT_IDENTITY] = 1800.0


Recompute = Literal["none", "selective", "full"]

EngineName = Literal["megatron", "deepspeed"]


class Zero(Settings):
    """What DeepSpeed's ranks split among them (Rajbhandari et al. 2020).

    ``stage``: 0 nothing, 1 the optimizer's state, 2 gradients, too, 3 weights, too. ``offload``
    keeps the optimizer's state, or with it the weights, in the host's memory.
    """

    stage: Annotated[int, Field(ge=0, le=3)] = 1
    offload: Literal["none", "optimizer", "weights"] = "none"

    def problems(self) -> Iterator[Problem]:
        """What a stage cannot offload."""
        if self.offload == "optimizer" and self.stage == 0:
            yield Problem(("offload",), "stage 0 splits no optimizer; use stage 1, 2 or 3")
        elif self.offload == "weights" and self.stage < 3:
            yield Problem(("offload",), f"stage {self.stage} splits no weights; use stage 3")


LOW_RANK = ("rank", "alpha", "targets")
METHOD_KEYS: dict[str, tuple[str, ...]] = {
    "lora": LOW_RANK,
    "qlora": LOW_RANK,
    "ia3": (),
    "prefix": ("virtual_tokens",),
    "prompt": ("virtual_tokens",),
}
"""The keys each method of an adapter has."""


class Adapter(Settings):
    """What is trained beside frozen weights.

    ``method``: ``lora``, a low-rank adapter (Hu et al. 2021); ``qlora``, the same beside weights
    of four bits (Dettmers et al. 2023); ``ia3``, vectors that scale activations (Liu et al.
    2022); ``prefix``, keys and values of virtual tokens in every layer (Li and Liang 2021);
    ``prompt``, virtual tokens before the text (Lester et al. 2021).
    ``targets``: the names of the linear layers that have a low-rank adapter, such as
    ``q_proj``; left out, all but the output layer.
    """

    method: Literal["lora", "qlora", "ia3", "prefix", "prompt"] = "lora"
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    virtual_tokens: PositiveInt = 20

    @property
    def virtual(self) -> int:
        """How many tokens stand before a text."""
        return self.virtual_tokens if self.method in ("prefix", "prompt") else 0

    @property
    def quantized(self) -> bool:
        """Whether the weights beneath are kept in four bits."""
        return self.method == "qlora"

    def problems(self, engine: EngineName, family: str, zero: Zero) -> Iterator[Problem]:
        """What of it the method lacks, or the engine or the model cannot do."""
        plain = Adapter(method=self.method)
        for key in (*LOW_RANK, "virtual_tokens"):
            if key not in METHOD_KEYS[self.method] and getattr(self, key) != getattr(plain, key):
                yield Problem((key,), f"method {self.method} has none; remove it")
        if engine == "megatron" and self.method != "lora":
            yield Problem(
                ("method",),
                f"engine megatron has no {self.method}; use lora, or engine: deepspeed",
            )
        elif self.quantized and zero.stage == 3:
            yield Problem(
                ("method",), "zero.stage 3 splits no weights of four bits; use 2, or lora"
            )
        elif self.virtual and zero.stage == 3:
            yield Problem(
                ("method",), f"{self.method} does not work under zero.stage 3 here; use 2, or lora"
            )
        elif self.quantized and family == "gpt2":
            yield Problem(
                ("method",), "gpt2 has no linear layers that can be quantized here; use lora"
            )


def no_such_target(target: str, known: Iterable[str]) -> str:
    """The line for a name of ``targets`` that no linear layer of the model has."""
    return (
        f"adapter.targets: {target!r} is no linear layer of the model that can have an "
        f"adapter; use {choices(sorted(known))}"
    )
