"""A layout's forecast: memory, step time and the figures people compare."""

from dataclasses import dataclass, replace
from typing import Any

from llmscale.planning.constants import Constants
from llmscale.planning.hardware import GIBIBYTE
from llmscale.planning.memory import Memory, Verdict, memory, verdict
from llmscale.planning.setup import Setup
from llmscale.planning.step_time import StepTime, step_time

DAY, HOUR = 86400.0, 3600.0


@dataclass(frozen=True)
class Forecast:
    """What is predicted of a setup."""

    setup: Setup
    memory: Memory
    step: StepTime

    @property
    def verdict(self) -> Verdict:
        """Whether it fits."""
        return verdict(self.memory, self.setup.device)

    @property
    def headroom(self) -> float:
        """Bytes of memory left; negative where it does not fit."""
        return self.setup.device.memory_bytes - self.memory.total

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.setup.tokens / self.setup.gpus / self.step.total

    @property
    def model_flops(self) -> float:
        """FLOP/s of one GPU by the model's mathematics: causal attention, no recompute."""
        setup = self.setup
        sample = setup.architecture.flops_per_sample(setup.vocabulary, setup.sequence_length)
        return sample * setup.global_batch / setup.gpus / self.step.total

    @property
    def hardware_flops(self) -> float:
        """FLOP/s of one GPU with what is computed a second time."""
        return self.model_flops * (1.0 + recomputed_share(self.setup))

    @property
    def peak(self) -> float:
        """FLOP/s that MFU and HFU are shares of: the device's, in the setup's numbers."""
        return self.setup.device.peak(self.setup.number)

    def days(self, tokens: float) -> float:
        """To train on so many tokens."""
        return tokens / self.setup.tokens * self.step.total / DAY

    def gpu_hours(self, tokens: float) -> float:
        """To train on so many tokens."""
        return self.days(tokens) * DAY / HOUR * self.setup.gpus


def forecast(setup: Setup, constants: Constants) -> Forecast:
    """Predicts memory and step time."""
    return Forecast(setup, memory(setup), step_time(setup, constants))


def recomputed_share(setup: Setup) -> float:
    """FLOP computed again, of those of forward and backward together."""
    model, length = setup.architecture, setup.sequence_length
    whole = model.flops_per_sample(setup.vocabulary, length)
    outer = 6.0 * length * setup.vocabulary * model.hidden_size
    scores = 6.0 * length**2 * model.attention_heads * model.head * model.all_layers
    again = {
        "none": 0.0,
        "selective": scores / 3,
        "operators": (whole - outer - scores) / 6,
        "full": (whole - outer) / 3,
    }[setup.recompute]
    return again * setup.recomputed_layers / whole


def plain(found: Forecast, tokens: float | None, price: float | None) -> dict[str, Any]:
    """For ``--json``; sizes in GiB, rates a GPU.

    Args:
        tokens: that the recipe trains on in all.
        price: of a GPU for an hour.
    """
    setup = found.setup
    answer: dict[str, Any] = {
        "layout": layout(setup),
        "fits": found.verdict,
        "memory_gib": {k: round(v / GIBIBYTE, 3) for k, v in vars(found.memory).items()}
        | {
            "total": round(found.memory.total / GIBIBYTE, 3),
            "headroom": round(found.headroom / GIBIBYTE, 3),
        },
        "step_seconds": {**vars(found.step), "total": found.step.total},
        "tokens_per_second_per_gpu": found.tokens_per_second,
        "model_tflops_per_gpu": found.model_flops / 1e12,
        "hardware_tflops_per_gpu": found.hardware_flops / 1e12,
        "mfu": found.model_flops / found.peak,
        "hfu": found.hardware_flops / found.peak,
    }
    if tokens is not None:
        answer |= {"days": found.days(tokens), "gpu_hours": found.gpu_hours(tokens)}
        if price is not None:
            answer["cost"] = found.gpu_hours(tokens) * price
    return answer


def layout(setup: Setup) -> dict[str, Any]:
    """A setup as a recipe's keys say it."""
    return {
        "tensor": setup.tensor,
        "pipeline": setup.pipeline,
        "virtual_pipeline": setup.virtual_pipeline,
        "layers_per_stage": list(setup.layers_per_stage) if setup.layers_per_stage else None,
        "context": setup.context,
        "expert": setup.expert,
        "data": setup.data,
        "sequence": setup.sequence_parallel,
        "micro": setup.micro_batch,
        "recompute": setup.recompute,
        "sharding": setup.sharding,
        "precision": setup.precision,
    }


def with_data(setup: Setup, gpus: int) -> Setup:
    """The same layout on another number of GPUs: with more or fewer copies of the model."""
    model = setup.tensor * setup.pipeline * setup.context
    return replace(setup, gpus=gpus, data=gpus // model)
