"""A recipe's stages of learning from rewards as the planner sees them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmscale.errors import RecipeError
from llmscale.models.architecture import RewardArchitecture
from llmscale.models.huggingface_config import read_architecture, read_vocabulary
from llmscale.parallel.layout import Layout
from llmscale.planning.constants import Constants
from llmscale.planning.forecast import layout, with_data
from llmscale.planning.hardware import GIBIBYTE, Device
from llmscale.planning.learning import (
    IterationTime,
    LearningSetup,
    RoleGroup,
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
from llmscale.stages.ppo_placement import ROLES
from llmscale.stages.ppo_settings import RewardSource
from llmscale.stages.reward import Reward
from llmscale.stages.tuned import vocabulary_of


@dataclass(frozen=True)
class LearningPlan:
    """What is planned of one stage; only ``why_not`` where its layout cannot be.

    Attributes:
        parameters: of the policy.
        memory: of a rank of each group.
        called: rewards that are functions or endpoints, whose time is not in the plan.
    """

    name: str
    parameters: int
    setup: LearningSetup | None
    memory: Mapping[str, RoleMemory]
    seconds: IterationTime | None
    called: tuple[str, ...]
    why_not: str = ""

    def verdict(self, group: str) -> Verdict | None:
        """Whether a rank of a group fits."""
        if self.setup is None:
            return None
        return verdict(self.memory[group], self.setup.policy.device)


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
    model, vocabulary = stage.architecture(recipe.stages), vocabulary_of(stage, recipe.stages)
    parameters = model.parameters(vocabulary)
    called = tuple(key for key, source in stage.rewards.items() if source.model is None)
    why_not = _why_not(name, stage, gpus)
    if why_not:
        return LearningPlan(name, parameters, None, {}, None, called, why_not)
    setup = learning_setup(recipe, stage, device, gpus)
    seconds = iteration_time(setup, constants)
    return LearningPlan(name, parameters, setup, learning_memory(setup), seconds, called)


def _why_not(name: str, stage: Ppo, gpus: int) -> str:
    """What keeps a stage from being planned; empty if nothing does."""
    if stage.adapter is not None:
        return (
            "an adapter's training is not planned; see what all weights need: "
            f"stages.{name}.adapter=null"
        )
    policy, *others = stage.layouts(gpus)
    taken = sum(layout.model_ranks * (layout.data or 1) for layout in others)
    own = policy.model_ranks * (policy.data or 1)
    if others and taken + own != gpus:
        return (
            f"the policy has {own} ranks and placement's groups {taken}, not {gpus} in all; use "
            f"--gpus {taken + own}"
        )
    return misfit(stage, gpus - taken)


def learning_setup(recipe: Recipe, stage: Ppo, device: Device, gpus: int) -> LearningSetup:
    """An iteration as a recipe has it, on so many devices."""
    layouts, shared = stage.layouts(gpus), device.shared(gpus)
    taken = sum(layout.model_ranks * (layout.data or 1) for layout in layouts[1:])
    policy = with_data(setup_of(recipe, stage, shared), gpus - taken)
    critic = None
    if stage.algorithm == "ppo":
        own = stage.critic_settings()
        tuned = stage.model_copy(update={"optimizer": own.optimizer or stage.optimizer})
        critic = with_data(setup_of(recipe, tuned, shared), gpus - taken)
        valued = RewardArchitecture.upon(critic.architecture, ("value",))
        critic = replace(critic, architecture=valued)
    return LearningSetup(
        policy=policy,
        groups=_groups(recipe, stage, policy, critic, layouts[1:]),
        samples=stage.rollout.samples,
        answer_tokens=stage.rollout.max_new_tokens,
        rollout_batch=stage.rollout.batch,
        vllm=stage.rollout.engine == "vllm",
        passes=stage.update.passes,
        ahead=stage.rollout.ahead,
    )


def _groups(
    recipe: Recipe, stage: Ppo, policy: Setup, critic: Setup | None, layouts: Sequence[Layout]
) -> dict[str, RoleGroup]:
    """The policy's ranks with all roles that no other group plays, then the others."""
    scorers = tuple(
        _scorer(recipe, source, policy)
        for source in stage.rewards.values()
        if source.model is not None
    )
    placed = {role for group in stage.placement.values() for role in group.roles}
    roles = {"policy": {*ROLES} - placed}
    roles |= {name: {*group.roles} for name, group in stage.placement.items()}
    placed_at = [None, *layouts]
    setups = [_at(policy, layout) for layout in placed_at]
    return {
        name: RoleGroup(
            ranks=setup.gpus,
            answers="rollout" in own,
            reference=setup if "reference" in own and stage.kl.wanted else None,
            scorers=scorers if "rewards" in own else (),
            critic=_at(critic, layout) if critic is not None and "critic" in own else None,
        )
        for (name, own), setup, layout in zip(roles.items(), setups, placed_at, strict=True)
    }


def _at(setup: Setup, layout: Layout | None) -> Setup:
    """The same model at another layout of its own ranks, if there is one."""
    if layout is None:
        return setup
    data = layout.data or 1
    return replace(
        setup,
        gpus=layout.model_ranks * data,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        data=data,
        layers_per_stage=layout.layers_per_stage,
        sequence_parallel=layout.sequence,
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
        needs = learning_memory(learning_setup(recipe, stage, device, recipe.cluster.ranks))
        need = max(needs.values(), key=lambda each: each.total)
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
    if plan.setup is None or plan.seconds is None:
        return {**answer, "own": None}
    own = {
        "layout": layout(plan.setup.policy),
        "groups": {name: _plain_group(plan, name) for name in plan.memory},
        "iteration_seconds": {**vars(plan.seconds), "total": plan.seconds.total},
        "answers": plan.setup.samples,
        "not_planned": list(plan.called),
    }
    return {**answer, "own": own}


def _plain_group(plan: LearningPlan, name: str) -> dict[str, Any]:
    assert plan.setup is not None
    need, device = plan.memory[name], plan.setup.policy.device
    sizes = {**vars(need), "total": need.total, "headroom": device.memory_bytes - need.total}
    return {
        "gpus": plan.setup.groups[name].ranks,
        "fits": plan.verdict(name),
        "memory_gib": {part: round(size / GIBIBYTE, 3) for part, size in sizes.items()},
    }
