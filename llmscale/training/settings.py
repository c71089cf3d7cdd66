"""What a recipe says of training, for every kind of stage that trains."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from llmscale.settings import NOT_IDENTITY, Problem, Settings, nearest_multiples

Precision = Literal["fp32", "bf16", "fp16"]


class Batch(Settings):
    """Samples a step: ``global`` over all ranks, ``micro`` in one forward pass of one rank."""

    global_: PositiveInt = Field(alias="global")
    micro: Annotated[PositiveInt, NOT_IDENTITY] = 1

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
    """On how many samples the validation loss is taken, at each checkpoint."""

    samples: PositiveInt = 256


class Health(Settings):
    """When a run that goes wrong stops."""

    nonfinite_steps: Annotated[PositiveInt, NOT_IDENTITY] = 5
    timeout_seconds: Annotated[PositiveFloat, NOT_IDENTITY] = 1800.0


Recompute = Literal["none", "selective", "full"]
