"""A recipe's training stages as the planner sees them: their setups, forecasts and searches."""

import re
from dataclasses import dataclass, replace

from llmscale.clusters.base import ClusterSettings
from llmscale.errors import RecipeError
from llmscale.models.architecture import Architecture
from llmscale.planning.calibration import calibration_file, load_calibration
from llmscale.planning.constants import Constants
from llmscale.planning.forecast import Forecast, forecast, with_data
from llmscale.planning.hardware import DEFAULT_SIZES, DEVICES, GIBIBYTE, Device, find_device
from llmscale.planning.memory import memory, verdict
from llmscale.planning.search import Search, search
from llmscale.planning.setup import Kernels, Setup, Sharding
from llmscale.recipe.recipe import Recipe
from llmscale.settings import choices, nearest_multiples
from llmscale.stages.finetune import Finetune
from llmscale.stages.ppo import Ppo
from llmscale.stages.pretrain import Pretrain
from llmscale.stages.trained import TrainedStage
from llmscale.stages.tuned import TunedStage, vocabulary_of

CHIPS = ("GB300", "GB200", "B300", "B200", "H200", *DEFAULT_SIZES)
"""As clusters, features and recipes name GPUs."""


@dataclass(frozen=True)
class StagePlan:
    """What is planned of one stage.

    Attributes:
        own: of the recipe's layout; None where it cannot run on so many GPUs, by ``why_not``.
        found: the search's best, in the recipe's precision.
        tokens: that the stage trains on; None where its data decide.
    """

    name: str
    parameters: int
    own: Forecast | None
    why_not: str
    found: Search
    tokens: int | None


def plan_recipe(
    recipe: Recipe, device: Device, gpus: int, constants: Constants
) -> dict[str, StagePlan]:
    """Plans each training stage of a recipe.

    Raises:
        RecipeError: if the recipe has nothing to plan.
    """
    return {
        name: _plan_stage(recipe, name, stage, device, gpus, constants)
        for name, stage in planned_stages(recipe).items()
    }


def constants_of(device: Device, calibration: str | None) -> Constants:
    """Those saved by a name, or for the device; else the shipped ones.

    Raises:
        RecipeError: if there is no calibration of that name.
    """
    if calibration is not None and not calibration_file(calibration).exists():
        raise RecipeError(
            f"--calibration {calibration}: there is none; make it by --calibrate metrics.jsonl"
        )
    return load_calibration(calibration or device.name)


def planned_stages(recipe: Recipe) -> dict[str, TrainedStage]:
    """The stages that train all of a model's weights by data alone.

    Raises:
        RecipeError: if there is none, nor one that learns from rewards.
    """
    found: dict[str, TrainedStage] = {
        name: stage
        for name, stage in recipe.stages.items()
        if isinstance(stage, Pretrain | Finetune) and getattr(stage, "adapter", None) is None
    }
    if not found and not any(isinstance(stage, Ppo) for stage in recipe.stages.values()):
        raise RecipeError(
            f"{recipe.name}: no stage trains all of a model's weights, which is what is planned; "
            "add one of kind pretrain, finetune or ppo"
        )
    return found


def _plan_stage(
    recipe: Recipe,
    name: str,
    stage: TrainedStage,
    device: Device,
    gpus: int,
    constants: Constants,
) -> StagePlan:
    setup = setup_of(recipe, stage, device.shared(gpus))
    why_not = misfit(stage, gpus)
    found = Search()
    if stage.engine == "megatron" and device.generation != "cpu":
        found = search(replace(setup, gpus=gpus), constants)
    return StagePlan(
        name=name,
        parameters=setup.architecture.parameters(setup.vocabulary),
        own=None if why_not else forecast(with_data(setup, gpus), constants),
        why_not=why_not,
        found=found,
        tokens=_tokens(stage),
    )


def misfit(stage: TrainedStage, gpus: int) -> str:
    """Why a recipe's layout cannot run on so many GPUs; empty if it can."""
    layout = stage.parallel
    if gpus % layout.model_ranks:
        return (
            f"{layout.model_ranks} ranks hold a model and do not divide {gpus} GPUs; "
            f"use --gpus {nearest_multiples(gpus, layout.model_ranks)}"
        )
    misfits = stage.batch.problems(
        data_ranks=gpus // layout.model_ranks,
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
    )
    return next((f"batch.{problem.path[0]}: {problem.message}" for problem in misfits), "")


def setup_of(recipe: Recipe, stage: TrainedStage, device: Device) -> Setup:
    """A stage's training as its recipe has it.

    What llmscale does on CUDA is in docs/gpu.md: gradients summed in fp32 and reduced beside
    the backward pass, weights gathered after it, fused attention, tensor-parallel messages
    beside the gradients of weights alone.

    Args:
        device: of one rank.
    """
    architecture = _architecture(recipe, stage)
    layout, ranks = stage.parallel, recipe.cluster.ranks
    length = getattr(stage, "sequence_length", None) or architecture.sequence_length
    deepspeed = stage.engine == "deepspeed"
    return Setup(
        architecture=architecture,
        vocabulary=vocabulary_of(stage, recipe.stages),
        sequence_length=length,
        device=device,
        gpus=ranks,
        global_batch=stage.batch.global_,
        micro_batch=stage.batch.micro,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        context=layout.context,
        expert=layout.expert,
        data=layout.data_ranks(ranks),
        layers_per_stage=layout.layers_per_stage,
        sequence_parallel=layout.sequence,
        recompute=stage.recompute,
        sharding=_sharding(stage),
        precision=stage.precision,
        number={"fp32": "fp32", "fp8": "fp8"}.get(stage.precision, "half"),  # type: ignore[arg-type]
        kernels=_kernels(device, deepspeed),
        fused=not deepspeed,
        scaling="block" if device.generation == "blackwell" else "tensor",
        tensor_overlap="backward" if device.generation != "cpu" else "none",
        data_overlap=device.generation != "cpu",
        # DeepSpeed's weights are fp32, of which bf16 copies are made: 4 + 4 + 8 bytes
        optimizer_bytes=_optimizer_bytes(stage),
        copied_gradient_bytes=2.0 if deepspeed and stage.precision != "fp32" else 0.0,
    )


def _optimizer_bytes(stage: TrainedStage) -> float:
    """On the GPU: none where it is offloaded, whose time is not in the plan."""
    if stage.engine == "deepspeed":
        return 8.0 if stage.zero.offload == "none" else 0.0
    return 12.0


def _architecture(recipe: Recipe, stage: TrainedStage) -> Architecture:
    if isinstance(stage, Pretrain):
        return stage.architecture()
    assert isinstance(stage, TunedStage)
    return stage.architecture(recipe.stages)


def _sharding(stage: TrainedStage) -> Sharding:
    if stage.engine == "deepspeed":
        kinds: tuple[Sharding, ...] = ("none", "optimizer", "gradients", "weights")
        return kinds[stage.zero.stage]
    return "optimizer" if stage.optimizer.distributed else "none"


def _kernels(device: Device, deepspeed: bool) -> Kernels:
    """flash-attn 3 on Hopper; flash-attn 2 or PyTorch's elsewhere; none of them on a CPU."""
    if device.generation == "cpu":
        return "unfused"
    return "native" if device.generation == "hopper" and not deepspeed else "ported"


def _tokens(stage: TrainedStage) -> int | None:
    """That the model reads in all steps of a stage."""
    if not isinstance(stage, Pretrain):
        return None
    phases = stage.phases()
    ends = [phase.first_sample for phase in phases[1:]] + [stage.batch.consumed(stage.steps)]
    return sum(
        (end - phase.first_sample) * phase.sequence_length
        for phase, end in zip(phases, ends, strict=True)
    )


def device_of(recipe: Recipe) -> Device:
    """The device that a recipe runs on: this CPU, or the GPU its cluster or its name tells.

    Raises:
        RecipeError: if it tells of none.
    """
    if recipe.cluster.device == "cpu":
        return find_device("cpu")
    told = gpu_of_cluster(recipe.cluster) or _chip_in(recipe.name)
    if told is None:
        raise RecipeError(
            f"{recipe.name}: does not tell which GPU its cluster has; use --gpu "
            f"{choices([*DEVICES, 'cpu'])}"
        )
    return find_device(told)


def gpu_of_cluster(cluster: ClusterSettings) -> str | None:
    """The GPU that a cluster's partition, constraint or options of sbatch name."""
    if cluster.slurm is None:
        return None
    own = cluster.slurm
    return _chip_in(" ".join([own.partition or "", own.constraint or "", *own.extra_lines]))


def _chip_in(text: str) -> str | None:
    upper = text.upper()
    chip = next((chip for chip in CHIPS if chip in upper), None)
    if chip in DEFAULT_SIZES:
        size = re.search(rf"{chip}[-_ ]?(?:SXM\d?|PCIE)?[-_ ]?\d*G?B?", upper)
        return size[0].rstrip("-_ ") if size else chip
    return chip


def device_told(recipe: Recipe) -> Device | None:
    """The GPU that a recipe for a cluster tells of, if it does."""
    cluster = recipe.cluster
    if cluster.on == "local" or cluster.device == "cpu":
        return None
    told = gpu_of_cluster(cluster) or _chip_in(recipe.name)
    return None if told is None else find_device(told)


def memory_warnings(recipe: Recipe) -> list[str]:
    """A line for each stage whose layout does not fit the GPU that the recipe tells of."""
    device = device_told(recipe)
    if device is None:
        return []
    try:
        stages = planned_stages(recipe)
        found = [_warning(recipe, name, stage, device) for name, stage in stages.items()]
    except RecipeError:
        return []  # there is nothing to plan
    return [line for line in found if line is not None]


def _warning(recipe: Recipe, name: str, stage: TrainedStage, device: Device) -> str | None:
    need = memory(setup_of(recipe, stage, device))
    if verdict(need, device) != "does not fit":
        return None
    return (
        f"warning: stages.{name}: its layout needs about {need.total / GIBIBYTE:.0f} GiB a GPU, "
        f"and {device.name} has {device.memory_bytes / GIBIBYTE:.0f}; see llmscale plan"
    )
