"""A rank that learns from rewards: from its settings to an exported policy, a line a step."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmscale.artifacts import read_json
from llmscale.data.prompts import Prompt, PromptSamples, read_prompts
from llmscale.data.tokenizer import load_tokenizer
from llmscale.errors import LlmscaleError, RecipeError
from llmscale.evaluation.reward_models import RewardModel
from llmscale.models.architecture import RewardArchitecture
from llmscale.models.huggingface_config import read_architecture, read_vocabulary
from llmscale.models.megatron import DTYPES
from llmscale.parallel.layout import Layout
from llmscale.parallel.world import World
from llmscale.rlhf.answer_log import AnswerLog
from llmscale.rlhf.controller import Controller, Notes
from llmscale.rlhf.critics import Critic, OwnCritic
from llmscale.rlhf.early import EarlyAnswers
from llmscale.rlhf.lesson import Lesson
from llmscale.rlhf.prompts import PromptOrder
from llmscale.rlhf.remote import (
    Remote,
    RemoteCritic,
    RemoteReference,
    RemoteRollout,
    RemoteScorers,
)
from llmscale.rlhf.roles import OwnReference, Reference, Roles
from llmscale.rlhf.rollout import AnswerEngine, AnswerForm, SharedRollout
from llmscale.rlhf.rollout_transformers import TransformersEngine
from llmscale.rlhf.rollout_vllm import VllmEngine
from llmscale.rlhf.scoring import (
    CalledScorer,
    ModelScorer,
    Scorer,
    WeighedScorers,
    endpoint,
    function_named,
)
from llmscale.rlhf.service import serve, tasks
from llmscale.rlhf.settings import RolloutEngineName
from llmscale.settings import choices
from llmscale.stages import tuning
from llmscale.stages.base import Workspace
from llmscale.stages.engines import FirstWeights, TrainedModel, built_engine
from llmscale.stages.ppo import SAMPLES, VALIDATION_ANSWERS, Ppo
from llmscale.stages.ppo_placement import Role
from llmscale.stages.ppo_settings import RewardSource
from llmscale.stages.train_rank import export_trained, joined_ranks, training_log
from llmscale.stages.tuned import ABOUT_EXAMPLES
from llmscale.training.checkpoint import Checkpoints, TrainingState
from llmscale.training.signals import StopRequest, listening

ANSWER_ENGINES: Mapping[RolloutEngineName, Callable[..., AnswerEngine]] = {
    "transformers": TransformersEngine,
    "vllm": VllmEngine,
}


def learn_from_rewards(stage: Ppo, workspace: Workspace) -> None:
    """Trains and exports the policy; every rank of the task calls it."""
    stage.require_packages()
    with listening() as stop, joined_ranks(stage, workspace) as world:
        if world.group > 0:
            serve_policy(stage, workspace, world)
            return
        say = print if world.first else _silent
        checkpoints = Checkpoints(workspace.folder.checkpoints, stage.checkpoint.keep, say)
        newest = checkpoints.newest_whole()
        with (
            asked_groups(stage, world) as groups,
            built_roles(stage, workspace, resumed=newest is not None, groups=groups) as roles,
        ):
            state = TrainingState() if newest is None else checkpoints.load(roles, newest)
            notes = _notes(stage, workspace, world, state)
            learning = controller(stage, workspace, roles, checkpoints, stop, notes, say)
            try:
                state = learning.learn(state)
            finally:
                if notes is not None:
                    notes.log.close()
            export_trained(_policy(stage, workspace), workspace, roles.policy, state)


def controller(
    stage: Ppo,
    workspace: Workspace,
    roles: Roles,
    checkpoints: Checkpoints,
    stop: StopRequest,
    notes: Notes | None,
    say: Callable[[str], None] = print,
) -> Controller:
    """The loop over a stage's prompts."""
    padding = _about(workspace)["padding"]
    return Controller(
        lesson=_lesson(stage, workspace.seed),
        roles=roles,
        prompts=PromptOrder(_prompts(stage, workspace), stage.weights()),
        held_out=_held_out(stage, workspace),
        form=tuning.row_form(stage, _policy_folder(workspace), padding, workspace.device),
        checkpoints=checkpoints,
        stop=stop,
        notes=notes,
        say=say,
    )


def serve_policy(stage: Ppo, workspace: Workspace, world: World) -> None:
    """What a rank beside the policy's does: it plays the roles of its group."""
    group, bridge = list(stage.placement.values())[world.group - 1], world.bridges[world.group]
    layout, there = stage.layouts(workspace.ranks)[world.group], stage.as_group(group)
    with ExitStack() as built:
        reference = critic = None
        if "reference" in group.roles and stage.kl.wanted:
            reference = built.enter_context(_reference(there, workspace, layout))
        if "critic" in group.roles:
            critic = built.enter_context(_critic(there, workspace, layout))
        able = tasks(
            _rollout(stage, workspace) if "rollout" in group.roles else None,
            reference,
            _scorers(stage, workspace) if "rewards" in group.roles else None,
            critic,
            Checkpoints(workspace.folder.checkpoints, stage.checkpoint.keep, _silent),
            bridge,
        )
        serve(bridge, able)


@contextmanager
def asked_groups(stage: Ppo, world: World) -> Iterator[dict[str, Remote]]:
    """The groups beside the policy's ranks, by name; told to end when all is over."""
    groups = {
        name: Remote(world.bridges.get(number)) for number, name in enumerate(stage.placement, 1)
    }
    reason: str | None = "the policy's ranks ended"
    try:
        yield groups
        reason = None
    except LlmscaleError as error:
        reason = str(error)
        raise
    finally:
        for remote in groups.values():
            remote.end(reason)


@contextmanager
def built_roles(
    stage: Ppo,
    workspace: Workspace,
    resumed: bool,
    groups: Mapping[str, Remote] | None = None,
) -> Iterator[Roles]:
    """All models in their places; those that learn without first weights on a resume.

    Args:
        groups: the ranks that play roles which these ranks do not, by name.
    """
    groups = groups or {}
    remotes: dict[Role, Remote] = {
        role: groups[name] for name, group in stage.placement.items() for role in group.roles
    }
    with ExitStack() as built:
        learning = built.enter_context(
            built_engine(
                stage,
                _policy(stage, workspace),
                FirstWeights(_policy_folder(workspace), workspace.seed, left_out=resumed),
                stage.parallel,
                workspace.device,
                temperature=stage.rollout.temperature,
            )
        )
        critic: Critic | None = None
        if "critic" in remotes:
            critic = RemoteCritic(remotes["critic"], learning.device)
        elif stage.algorithm == "ppo":
            critic = built.enter_context(_critic(stage, workspace, stage.parallel, resumed))
        reference: Reference | None = None
        if "reference" in remotes and stage.kl.wanted:
            reference = RemoteReference(remotes["reference"], learning.device)
        elif stage.kl.wanted:
            reference = built.enter_context(_reference(stage, workspace, stage.parallel))
        rollout = RemoteRollout(remotes["rollout"]) if "rollout" in remotes else None
        yield Roles(
            policy=learning,
            critic=critic,
            reference=reference,
            rollout=rollout or _rollout(stage, workspace),
            scorers=(
                RemoteScorers(remotes["rewards"])
                if "rewards" in remotes
                else _scorers(stage, workspace)
            ),
            early=EarlyAnswers(rollout) if rollout and stage.rollout.ahead else None,
            groups=groups,
        )


@contextmanager
def _reference(stage: Ppo, workspace: Workspace, layout: Layout) -> Iterator[Reference]:
    """The model to start from, never trained."""
    start = _policy_folder(workspace)
    with built_engine(
        stage,
        replace(_policy(stage, workspace), adapter=None),
        FirstWeights(start, workspace.seed),
        layout,
        workspace.device,
        frozen=True,
        temperature=stage.rollout.temperature,
    ) as engine:
        yield OwnReference(engine)


@contextmanager
def _critic(
    stage: Ppo, workspace: Workspace, layout: Layout, resumed: bool = False
) -> Iterator[OwnCritic]:
    """A model with a value at every place, on the policy's or on another one's weights."""
    folder = workspace.inputs.get("critic.start_from", _policy_folder(workspace))
    architecture = RewardArchitecture.upon(read_architecture(folder), ("value",))
    own = stage.critic_settings()
    with built_engine(
        stage.model_copy(update={"optimizer": own.optimizer or stage.optimizer}),
        TrainedModel(
            architecture=architecture,
            vocabulary=read_vocabulary(folder),
            tokenizer=folder,
            padding=_about(workspace)["padding"],
        ),
        FirstWeights(folder, workspace.seed, left_out=resumed),
        layout,
        workspace.device,
    ) as engine:
        yield OwnCritic(engine, _lesson(stage, workspace.seed))


def _policy_folder(workspace: Workspace) -> Path:
    return workspace.inputs["start_from"]


def _about(workspace: Workspace) -> Any:
    return read_json(workspace.folder.path / ABOUT_EXAMPLES)


def _policy(stage: Ppo, workspace: Workspace) -> TrainedModel:
    start = _policy_folder(workspace)
    return tuning.tuned_model(stage, workspace.folder, start, read_architecture(start))


def _rollout(stage: Ppo, workspace: Workspace) -> SharedRollout:
    about, start = _about(workspace), _policy_folder(workspace)
    form = AnswerForm(
        temperature=stage.rollout.temperature,
        most=stage.rollout.max_new_tokens,
        ends=tuple(about["ends"]),
        padding=about["padding"],
        batch=stage.rollout.batch,
        length=_longest_prompt(stage, workspace) + stage.rollout.max_new_tokens,
    )
    engine = ANSWER_ENGINES[stage.rollout.engine](
        start, form, DTYPES[stage.precision], workspace.device
    )
    return SharedRollout(engine, load_tokenizer(start), form)


def _scorers(stage: Ppo, workspace: Workspace) -> WeighedScorers:
    scorers = {name: _scorer(name, source, workspace) for name, source in stage.rewards.items()}
    weights = {name: source.weight for name, source in stage.rewards.items()}
    return WeighedScorers(scorers, weights, stage.rollout.without_end)


def _scorer(name: str, source: RewardSource, workspace: Workspace) -> Scorer:
    if source.function is not None:
        return CalledScorer(function_named(source.function), source.timeout_seconds)
    if source.url is not None:
        return CalledScorer(endpoint(source.url, source.timeout_seconds), source.timeout_seconds)
    model = RewardModel(workspace.inputs[f"rewards.{name}.model"], workspace.device)
    if source.head is None:
        return ModelScorer(model, 0)
    if source.head not in model.heads:
        raise RecipeError(
            f"rewards.{name}.head: {source.head!r} is no head of the model; use "
            f"{choices(model.heads)}"
        )
    return ModelScorer(model, model.heads.index(source.head))


def _prompts(stage: Ppo, workspace: Workspace) -> dict[str, PromptSamples]:
    return {
        name: PromptSamples(_split(workspace, name, "train"), workspace.seed) for name in stage.data
    }


def _held_out(stage: Ppo, workspace: Workspace) -> list[Prompt]:
    """The first prompts of each data set's validation split."""
    return [
        prompt
        for name in stage.data
        for prompt in _split(workspace, name, "validation")[: stage.validation.samples]
    ]


def _longest_prompt(stage: Ppo, workspace: Workspace) -> int:
    splits = ((name, split) for name in stage.data for split in ("train", "validation"))
    return max(len(p.tokens) for one in splits for p in _split(workspace, *one))


def _split(workspace: Workspace, name: str, split: str) -> list[Prompt]:
    folder = workspace.folder.path / Path(ABOUT_EXAMPLES).parent
    return read_prompts(folder / name / f"{split}.jsonl")


def _lesson(stage: Ppo, seed: int) -> Lesson:
    assert stage.steps is not None, "the recipe was checked"
    return Lesson(
        algorithm=stage.algorithm,
        steps=stage.steps,
        seed=seed,
        batch=stage.batch,
        rollout=stage.rollout,
        kl=stage.kl,
        expectation=stage.critic_settings(),
        update=stage.update,
        checkpointing=stage.checkpoint,
        samples_every=stage.samples_every,
    )


def _notes(stage: Ppo, workspace: Workspace, world: World, state: TrainingState) -> Notes | None:
    assert stage.steps is not None, "the recipe was checked"
    log = training_log(stage, stage.steps, workspace, world, state)
    if log is None:
        return None
    folder = workspace.folder.path
    return Notes(
        log,
        AnswerLog(folder / SAMPLES, state.step),
        AnswerLog(folder / VALIDATION_ANSWERS, state.step),
    )


def _silent(_line: str) -> None:
    pass
