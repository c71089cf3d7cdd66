"""Learning from rewards as the planner sees it: memory by role, and the parts of an iteration.

Every rank holds its part of policy, critic and reference at the stage's layout, and a whole copy of
the policy that answers and of each reward model. What is only there for a while, activations and
the copy's keys and values, is counted once: by the part of an iteration that needs most.
All rows are taken as long as they may be, and all answers as well.
"""

from dataclasses import dataclass, replace
from math import ceil

from llmscale.planning.communication import Group, Network
from llmscale.planning.constants import Constants
from llmscale.planning.kernels import Machine
from llmscale.planning.memory import CONTEXT_BYTES, PROCESS_BYTES, Memory, memory
from llmscale.planning.parameters import most_parameters
from llmscale.planning.setup import Setup
from llmscale.planning.step_time import micro_batch_time, step_time

EAGER_LAYER_SECONDS = 0.75e-3
"""Of transformers' generation, a token and layer: Python between kernels, which a GPU waits for.
Assumed, not measured: 24 ms a token of 32 layers."""
FP32_LOGITS = 4
"""Copies of a token's logits that sampling has: its own, scaled, noise, and their sum."""


@dataclass(frozen=True)
class LearningSetup:
    """An iteration of learning from rewards.

    Attributes:
        policy: its training at the layout; ``global_batch`` is of an update.
        critic: the same of a critic, if there is one.
        reference: whether there is one.
        scorers: reward models, each whole on one device.
        samples: answers an iteration.
        answer_tokens: tokens that an answer has at most.
        rollout_batch: answers that a rank generates at a time.
        passes: over an iteration's answers.
    """

    policy: Setup
    critic: Setup | None
    reference: bool
    scorers: tuple[Setup, ...]
    samples: int
    answer_tokens: int
    rollout_batch: int
    passes: int

    @property
    def trained(self) -> list[Setup]:
        """Those that learn."""
        return [self.policy] if self.critic is None else [self.policy, self.critic]

    @property
    def rank_samples(self) -> float:
        """Answers that a rank generates and scores in an iteration."""
        return max(1.0, self.samples / self.policy.gpus)

    @property
    def generated(self) -> float:
        """Answers that a rank generates at a time."""
        return min(self.rank_samples, self.rollout_batch)


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


def learning_memory(setup: LearningSetup) -> RoleMemory:
    """What a rank of the fullest pipeline stage holds."""
    needs = [memory(each) for each in setup.trained]
    policy = setup.policy
    on_cpu = policy.device.generation == "cpu"
    return RoleMemory(
        policy=needs[0].state,
        critic=needs[1].state if setup.critic is not None else 0.0,
        reference=_weight_bytes(policy) if setup.reference else 0.0,
        rollout=whole_bytes(policy),
        rewards=sum(map(whole_bytes, setup.scorers)),
        working=max(generation_bytes(setup), *map(_training_bytes, needs)),
        buffers=PROCESS_BYTES if on_cpu else CONTEXT_BYTES + _channel_bytes(needs),
    )


def whole_bytes(setup: Setup) -> float:
    """Of all weights of a model, on one device."""
    return float(setup.weight_bytes * setup.architecture.parameters(setup.vocabulary))


def generation_bytes(setup: LearningSetup) -> float:
    """Keys and values of a batch of answers, and the logits of their next tokens.

    Two vectors of ``key-value heads x head size`` a token and layer.
    """
    policy, model = setup.policy, setup.policy.architecture
    token = 2 * model.groups * model.head * model.layers * policy.weight_bytes
    logits = 4.0 * FP32_LOGITS * policy.vocabulary
    return setup.generated * (policy.sequence_length * token + logits)


def iteration_time(setup: LearningSetup, constants: Constants) -> IterationTime:
    """Predicts the parts of an iteration."""
    updates = setup.passes * setup.samples / setup.policy.global_batch
    asked = [*setup.trained, *([setup.policy] if setup.reference else [])]
    whole = [replace(each, global_batch=setup.samples) for each in asked]
    return IterationTime(
        rollout=rollout_seconds(setup, constants),
        score=sum(
            forward_seconds(replace(each, global_batch=ceil(setup.rank_samples)), constants)
            for each in setup.scorers
        ),
        examine=sum(forward_seconds(each, constants) for each in whole),
        update=updates * sum(step_time(each, constants).total for each in setup.trained),
        synchronize=synchronize_seconds(setup.policy, constants),
    )


def rollout_seconds(setup: LearningSetup, constants: Constants) -> float:
    """Of a rank's answers by transformers' generation, batch after batch.

    Prompts are read in one pass. Then a token costs the reading of all weights and of the keys and
    values so far, or the arithmetic of the batch, or the Python between the kernels: the most of
    the three (Pope et al. 2023, section 2).
    """
    policy, model = setup.policy, setup.policy.architecture
    machine = Machine(policy.device, constants)
    prompt = max(1, policy.sequence_length - setup.answer_tokens)
    reading = replace(alone(policy), sequence_length=prompt, micro_batch=round(setup.generated))
    cached = generation_bytes(setup) * (prompt + setup.answer_tokens / 2) / policy.sequence_length
    moved = machine.move(whole_bytes(policy) + cached)
    flops = 2.0 * model.parameters(policy.vocabulary) * setup.generated
    python = 0.0 if policy.device.generation == "cpu" else EAGER_LAYER_SECONDS * model.layers
    token = max(moved, flops / machine.rate(policy.number), python)
    batches = setup.rank_samples / setup.generated
    return batches * (forward_seconds(reading, constants) + setup.answer_tokens * token)


def forward_seconds(setup: Setup, constants: Constants) -> float:
    """Of forward passes over a global batch; a pipeline fills and drains once."""
    inner = micro_batch_time(setup, constants)
    layer = inner.layer.forward + inner.messages.forward
    stage = setup.most_layers * layer + inner.embedding.forward + inner.vocabulary.forward
    return (setup.micro_batches + setup.pipeline - 1) * stage


def synchronize_seconds(setup: Setup, constants: Constants) -> float:
    """Of the policy's whole weights on their way to every rank's copy."""
    network = Network(setup.device, constants)
    weights = whole_bytes(setup)
    stages = Group(setup.pipeline, setup.gpus // setup.pipeline)
    return network.gather(weights, Group(setup.tensor)) + network.gather(weights, stages)


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


def _training_bytes(need: Memory) -> float:
    return need.activations + need.logits


def _channel_bytes(needs: list[Memory]) -> float:
    """Of the roles that learn: what is no CUDA context, which they share."""
    return max(need.buffers for need in needs) - CONTEXT_BYTES
