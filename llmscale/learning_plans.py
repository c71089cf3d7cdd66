"""A recipe's stages of learning from rewards as the planner sees them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmscale.errors import RecipeError
from llmscale.models.architecture import RewardArchitecture
from llmscale.models.huggingface_config import read_architecture, read_vocabulary
from llmscale.planning.constants import Constants
from llmscale.planning.forecast import layout, with_data
from llmscale.planning.hardware import GIBIBYTE, Device
from llmscale.planning.learning import (
    IterationTime,
    LearningSetup,
    RoleMemory,
    alone,
    iteration_time,
    learning_memory,
)
from llmscale.planning.memory import Verdict, verdict
from llmscale.planning.setup import Setup
from llmscale.plans import device_told, misfit, setup_of
from llmscale.recipe.recipe import Recipe
from llmscale.stages.ppo import Ppo
from llmscale.stages.ppo_settings import RewardSource
from llmscale.stages.reward import Reward
from llmscale.stages.tuned import vocabulary_of


@dataclass(frozen=True)
class LearningPlan:
    """What is planned of one stage; only ``why_not`` where its layout cannot be.

    Attributes:
        parameters: of the policy.
        called: rewards that are functions or endpoints, whose time is not in the plan.
    """

    name: str
    parameters: int
    setup: LearningSetup | None
    memory: RoleMemory | None
    seconds: IterationTime | None
    called: tuple[str, ...]
    why_not: str = ""

    @property
    def verdict(self) -> Verdict | None:
        """Whether it fits."""
        if self.setup is None or self.memory is None:
            return None
        return verdict(self.memory, self.setup.policy.device)


def learning_stages(recipe: Recipe) -> dict[str, Ppo]:
    """The stages that learn from rewards."""
    return {name: stage for name, stage in recipe.stages.items() if isinstance(stage, Ppo)}


def plan_learning(
    recipe: Recipe, device: Device, gpus: int, constants: Constants
) -> dict[str, LearningPlan]:
    """Plans each stage of kind ppo at its own layout; others are not searched for."""
    return {
        name: _planned(recipe, name, stage, device, gpus, constants)
        for name, stage in learning_stages(recipe).items()
    }


def _planned(
    recipe: Recipe, name: str, stage: Ppo, device: Device, gpus: int, constants: Constants
) -> LearningPlan:
    setup = learning_setup(recipe, stage, device, gpus)
    model = setup.policy.architecture
    parameters = model.parameters(setup.policy.vocabulary)
    called = tuple(key for key, source in stage.rewards.items() if source.model is None)
    why_not = misfit(stage, gpus)
    if stage.adapter is not None:
        why_not = (
            "an adapter's training is not planned; see what all weights need: "
            f"stages.{name}.adapter=null"
        )
    if why_not:
        return LearningPlan(name, parameters, None, None, None, called, why_not)
    seconds = iteration_time(setup, constants)
    return LearningPlan(name, parameters, setup, learning_memory(setup), seconds, called)


def learning_setup(recipe: Recipe, stage: Ppo, device: Device, gpus: int) -> LearningSetup:
    """An iteration as a recipe has it, on so many devices."""
    policy = with_data(setup_of(recipe, stage, device.shared(gpus)), gpus)
    critic = None
    if stage.algorithm == "ppo":
        own = stage.critic_settings()
        tuned = stage.model_copy(update={"optimizer": own.optimizer or stage.optimizer})
        critic = with_data(setup_of(recipe, tuned, device.shared(gpus)), gpus)
        valued = RewardArchitecture.upon(critic.architecture, ("value",))
        critic = replace(critic, architecture=valued)
    return LearningSetup(
        policy=policy,
        critic=critic,
        reference=stage.kl.wanted,
        scorers=tuple(
            _scorer(recipe, source, policy)
            for source in stage.rewards.values()
            if source.model is not None
        ),
        samples=stage.rollout.samples,
        answer_tokens=stage.rollout.max_new_tokens,
        rollout_batch=stage.rollout.batch,
        passes=stage.update.passes,
    )


def _scorer(recipe: Recipe, source: RewardSource, policy: Setup) -> Setup:
    """A reward model on one device, which scores a rank's part of an iteration's answers."""
    assert source.model is not None
    stage = recipe.stages.get(source.model)
    if isinstance(stage, Reward):
        architecture = stage.architecture(recipe.stages)
        scored = RewardArchitecture.upon(architecture, stage.heads)
        vocabulary = vocabulary_of(stage, recipe.stages)
    else:
        folder = Path(source.model)
        found = read_architecture(folder)
        if not isinstance(found, RewardArchitecture):
            raise RecipeError(f"{folder}: is no model that scores texts")
        scored, vocabulary = found, read_vocabulary(folder)
    return replace(alone(policy), architecture=scored, vocabulary=vocabulary)


def learning_warnings(recipe: Recipe) -> list[str]:
    """A line for each stage whose roles do not fit the GPU that the recipe tells of."""
    device = device_told(recipe)
    if device is None:
        return []
    found = []
    for name, stage in learning_stages(recipe).items():
        if stage.adapter is not None:
            continue
        need = learning_memory(learning_setup(recipe, stage, device, recipe.cluster.ranks))
        if verdict(need, device) == "does not fit":
            found.append(
                f"warning: stages.{name}: its roles need about {need.total / GIBIBYTE:.0f} GiB a "
                f"GPU, and {device.name} has {device.memory_bytes / GIBIBYTE:.0f}; see llmscale "
                "plan"
            )
    return found


def plain_learning(plan: LearningPlan) -> dict[str, Any]:
    """For ``--json``; sizes in GiB."""
    answer: dict[str, Any] = {"parameters": plan.parameters, "why_not": plan.why_not}
    if plan.setup is None or plan.memory is None or plan.seconds is None:
        return {**answer, "own": None}
    sizes = {**vars(plan.memory), "total": plan.memory.total}
    sizes["headroom"] = plan.setup.policy.device.memory_bytes - plan.memory.total
    own = {
        "layout": layout(plan.setup.policy),
        "fits": plan.verdict,
        "memory_gib": {name: round(size / GIBIBYTE, 3) for name, size in sizes.items()},
        "iteration_seconds": {**vars(plan.seconds), "total": plan.seconds.total},
        "answers": plan.setup.samples,
        "not_planned": list(plan.called),
    }
    return {**answer, "own": own}
