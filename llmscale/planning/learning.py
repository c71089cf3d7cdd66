"""Learning from rewards as the planner sees it: memory by role, and the parts of an iteration.

A rank holds what its group plays: its part of policy, critic and reference at their layouts, and
a whole copy of the policy that answers and of each reward model. What is only there for a while,
activations and the copy's keys and values, is counted once: by the part that needs most.
All rows are taken as long as they may be, and all answers as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil

from llmscale.planning.communication import Group, Network
from llmscale.planning.constants import Constants
from llmscale.planning.kernels import Machine
from llmscale.planning.memory import CONTEXT_BYTES, PROCESS_BYTES, memory
from llmscale.planning.parameters import most_parameters
from llmscale.planning.setup import Setup
from llmscale.planning.step_time import micro_batch_time, step_time

EAGER_LAYER_SECONDS = 0.75e-3
"""Of transformers' generation, a token and layer: Python between kernels, which a GPU waits for.
Assumed, not measured: 24 ms a token of 32 layers."""
FP32_LOGITS = 4
"""Copies of a token's logits that sampling has: its own, scaled, noise, and their sum."""


@dataclass(frozen=True)
class RoleGroup:
    """Ranks that play roles beside learning.

    Attributes:
        answers: whether they have copies of the policy that answer.
        reference: the reference at their layout, if they have it.
        scorers: reward models, each whole on one device.
        critic: the critic's training at their layout, if they have it.
    """

    ranks: int
    answers: bool
    reference: Setup | None
    scorers: tuple[Setup, ...]
    critic: Setup | None = None


@dataclass(frozen=True)
class LearningSetup:
    """An iteration of learning from rewards.

    Attributes:
        policy: its training at the layout; ``global_batch`` is of an update.
        groups: by name; the first one is the policy's ranks.
        samples: answers an iteration.
        answer_tokens: tokens that an answer has at most.
        rollout_batch: answers that a rank generates at a time.
        passes: over an iteration's answers.
        vllm: whether vLLM answers: it keeps room for a whole batch of keys and values at all
            times, and its kernels are started as one graph.
        ahead: whether the next answers are begun before an update.
    """

    policy: Setup
    groups: Mapping[str, RoleGroup]
    samples: int
    answer_tokens: int
    rollout_batch: int
    passes: int
    vllm: bool = False
    ahead: bool = False

    @property
    def answering(self) -> RoleGroup:
        """The group that answers."""
        return next(group for group in self.groups.values() if group.answers)

    @property
    def generated(self) -> float:
        """Answers that a rank generates at a time."""
        return min(self.rank_samples(self.answering), self.rollout_batch)

    def rank_samples(self, group: RoleGroup) -> float:
        """Answers that a rank of a group generates or scores in an iteration."""
        return max(1.0, self.samples / group.ranks)


@dataclass(frozen=True)
class RoleMemory:
    """Bytes of one rank by role, and what the most needy part of an iteration adds.

    ``policy`` and ``critic`` are weights, gradients and optimizer; the others weights alone.
    """

    policy: float
    critic: float
    reference: float
    rollout: float
    rewards: float
    working: float
    buffers: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class IterationTime:
    """Seconds of an iteration's parts, named as ``metrics.jsonl`` does."""

    rollout: float
    score: float
    examine: float
    update: float
    synchronize: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


def learning_memory(setup: LearningSetup) -> dict[str, RoleMemory]:
    """What a rank of each group's fullest pipeline stage holds, by group."""
    return {
        name: _group_memory(setup, group, learns=number == 0)
        for number, (name, group) in enumerate(setup.groups.items())
    }


def _group_memory(setup: LearningSetup, group: RoleGroup, learns: bool) -> RoleMemory:
    policy = setup.policy
    trained = [policy] if learns else []
    trained += [] if group.critic is None else [group.critic]
    needs = [memory(each) for each in trained]
    buffers = PROCESS_BYTES if policy.device.generation == "cpu" else CONTEXT_BYTES
    working = [need.activations + need.logits for need in needs]
    rollout = whole_bytes(policy) if group.answers else 0.0
    if group.answers and setup.vllm:
        rollout += setup.rollout_batch * cached_bytes(policy)
        working.append(setup.generated * logits_bytes(policy))
    elif group.answers:
        working.append(generation_bytes(setup))
    return RoleMemory(
        policy=needs[0].state if learns else 0.0,
        critic=0.0 if group.critic is None else needs[-1].state,
        reference=0.0 if group.reference is None else _weight_bytes(group.reference),
        rollout=rollout,
        rewards=sum(map(whole_bytes, group.scorers)),
        working=max(working, default=0.0),
        buffers=max([buffers, *(need.buffers for need in needs)]),
    )


def whole_bytes(setup: Setup) -> float:
    """Of all weights of a model, on one device."""
    return float(setup.weight_bytes * setup.architecture.parameters(setup.vocabulary))


def generation_bytes(setup: LearningSetup) -> float:
    """Keys and values of a batch of answers, and the logits of their next tokens."""
    return setup.generated * (cached_bytes(setup.policy) + logits_bytes(setup.policy))


def logits_bytes(policy: Setup) -> float:
    """Of the token that follows a sequence."""
    return 4.0 * FP32_LOGITS * policy.vocabulary


def cached_bytes(policy: Setup) -> float:
    """Keys and values of a sequence: ``key-value heads x head size`` each a token and layer."""
    model = policy.architecture
    token = 2 * model.groups * model.head * model.layers * policy.weight_bytes
    return float(policy.sequence_length * token)


def iteration_time(setup: LearningSetup, constants: Constants) -> IterationTime:
    """Predicts the parts of an iteration; of a rollout ahead, what an update does not hide.

    Policy and critic learn one after the other on common ranks, else at the same time.
    """
    updates = setup.passes * setup.samples / setup.policy.global_batch
    update = step_time(setup.policy, constants).total
    rollout = rollout_seconds(setup, constants)
    seen_in_update = updates == 1 and not setup.ahead
    asked, score = [] if seen_in_update else [setup.policy], 0.0
    for number, group in enumerate(setup.groups.values()):
        if group.critic is not None:
            critic = step_time(group.critic, constants).total
            update = max(update, critic) if number else update + critic
        asked += [each for each in (group.critic, group.reference) if each is not None]
        each = ceil(setup.rank_samples(group))
        scorers = (replace(scorer, global_batch=each) for scorer in group.scorers)
        score += sum(forward_seconds(scorer, constants) for scorer in scorers)
    whole = (replace(each, global_batch=setup.samples) for each in asked)
    update *= updates
    return IterationTime(
        rollout=max(0.0, rollout - update) if setup.ahead else rollout,
        score=score,
        examine=sum(forward_seconds(each, constants) for each in whole),
        update=update,
        synchronize=synchronize_seconds(setup, constants),
    )


def rollout_seconds(setup: LearningSetup, constants: Constants) -> float:
    """Of a rank's answers, batch after batch.

    Prompts are read in one pass. Then a token costs the reading of all weights and of the keys and
    values so far, or the arithmetic of the batch, or with transformers the Python between the
    kernels: the most of the three (Pope et al. 2023, section 2).
    """
    policy, model = setup.policy, setup.policy.architecture
    machine = Machine(policy.device, constants)
    prompt = max(1, policy.sequence_length - setup.answer_tokens)
    reading = replace(alone(policy), sequence_length=prompt, micro_batch=round(setup.generated))
    cached = generation_bytes(setup) * (prompt + setup.answer_tokens / 2) / policy.sequence_length
    moved = machine.move(whole_bytes(policy) + cached)
    flops = 2.0 * model.parameters(policy.vocabulary) * setup.generated
    eager = policy.device.generation != "cpu" and not setup.vllm
    python = EAGER_LAYER_SECONDS * model.layers if eager else 0.0
    token = max(moved, flops / machine.rate(policy.number), python)
    batches = setup.rank_samples(setup.answering) / setup.generated
    return batches * (forward_seconds(reading, constants) + setup.answer_tokens * token)


def forward_seconds(setup: Setup, constants: Constants) -> float:
    """Of forward passes over a global batch; a pipeline fills and drains once."""
    inner = micro_batch_time(setup, constants)
    layer = inner.layer.forward + inner.messages.forward
    stage = setup.most_layers * layer + inner.embedding.forward + inner.vocabulary.forward
    return (setup.micro_batches + setup.pipeline - 1) * stage


def synchronize_seconds(setup: LearningSetup, constants: Constants) -> float:
    """Of the policy's whole weights on their way to every copy that answers.

    They are made whole in each copy of the policy; from there one message goes to another group,
    and around in it.
    """
    policy = setup.policy
    network, weights = Network(policy.device, constants), whole_bytes(policy)
    stages = Group(policy.pipeline, policy.gpus // policy.pipeline)
    seconds = network.gather(weights, Group(policy.tensor)) + network.gather(weights, stages)
    if setup.answering is next(iter(setup.groups.values())):
        return seconds
    beyond = network.send(weights, policy.device.domain)
    return seconds + beyond + network.gather(weights, Group(setup.answering.ranks))


def alone(setup: Setup) -> Setup:
    """The same model whole on one device, one pass at a time."""
    return replace(
        setup,
        gpus=1,
        data=1,
        tensor=1,
        pipeline=1,
        virtual_pipeline=1,
        context=1,
        layers_per_stage=None,
        sequence_parallel=False,
        sharding="none",
        recompute="none",
        global_batch=1,
        micro_batch=1,
    )


def _weight_bytes(setup: Setup) -> float:
    return setup.weight_bytes * most_parameters(setup).total
