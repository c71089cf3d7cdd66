"""What the ranks of a proof of learning from rewards do: iterations on given answers.

The answers and what they are worth are random numbers, the same on every rank, so that nothing
is compared but what models, estimates and updates make of them. Each task runs within the
process groups of its own layout.
"""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from llmscale.artifacts import write_json
from llmscale.data.prompts import Prompt
from llmscale.models.architecture import Architecture, RewardArchitecture
from llmscale.models.huggingface import fill
from llmscale.rlhf.answers import Answer
from llmscale.rlhf.critics import OwnCritic
from llmscale.rlhf.examine import examined
from llmscale.rlhf.lesson import Lesson
from llmscale.rlhf.roles import OwnReference, Roles
from llmscale.rlhf.scoring import Scores
from llmscale.rlhf.updates import updated
from llmscale.training.checkpoint import Checkpoints, TrainingState
from llmscale.training.megatron_engine import MegatronEngine
from llmscale.training.rows import RowForm
from llmscale.training.settings import Checkpointing, Optimizer
from llmscale.verify.differences import Difference, differences, parameter_value, whole_values
from llmscale.verify.proof import Learning, Proof
from llmscale.verify.runs import (
    CURVES,
    FIRST_ORDINARY,
    PADDING,
    TENSORS,
    exports_apart,
    write_folder,
)

FIGURES = ("gradient_norm", "loss", "value_loss", "kl", "update_kl", "entropy")
"""Of an iteration: what is compared. Shares of clipped tokens are not, since the last bit of a
ratio decides whether a token counts."""
CRITIC_SEED, REFERENCE_SEED = 1, 2
"""Added to the proof's: a reference that is not the policy has a divergence from the start on."""


def run_reference(proof: Proof, folder: Path) -> None:
    """Learns at one rank; leaves each iteration's figures and parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    alone, curves = proof.at_one_rank(), []
    roles = _roles(alone)
    names: dict[str, list[str]] = {}
    for step in range(proof.steps + 1):
        if step == proof.steps:
            write_folder(_engines(roles)["policy"], folder / "hf")
        curves.append(_iteration(alone, roles, step))
        for name, engine in _engines(roles).items():
            parameters = whole_values(engine, parameter_value)
            names[name] = sorted(parameters)
            save_file(parameters, _tensors(folder, step + 1, name))
    write_json(folder / CURVES, curves)
    write_json(folder / TENSORS, names)


def run_layout(proof: Proof, reference: Path, folder: Path) -> None:
    """Learns at the layout and compares; leaves figures, differences, a checkpoint, an export."""
    curves: list[dict[str, float]] = []
    found: list[Difference] = []
    roles = _roles(proof)
    for step in range(proof.steps):
        curves.append(_iteration(proof, roles, step))
        found += _compared(roles, reference, step + 1)
    Checkpoints(folder / "checkpoints", keep=1).save(roles, TrainingState(step=proof.steps))
    write_folder(_engines(roles)["policy"], folder / "hf")
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [asdict(difference) for difference in found])
    if dist.get_rank() == 0:
        export_found = exports_apart(reference / "hf", folder / "hf", proof.steps)
        answer = {
            "curves": curves,
            "differences": [difference for part in everyone for difference in part],
            "export": [asdict(difference) for difference in export_found],
        }
        write_json(folder / "layout.json", answer)
    dist.barrier()


def resume_at_one_rank(proof: Proof, reference: Path, folder: Path) -> None:
    """Loads the layout's checkpoint at one rank, compares, and learns one iteration more."""
    alone = proof.at_one_rank().model_copy(update={"optimizer": proof.optimizer})
    roles = _roles(alone)
    state = Checkpoints(folder / "checkpoints", keep=1).load(roles, proof.steps)
    found = _compared(roles, reference, state.step)
    curve = _iteration(alone, roles, state.step)
    found += _compared(roles, reference, state.step + 1)
    answer = {"curves": [curve], "differences": [asdict(difference) for difference in found]}
    write_json(folder / "resumed.json", answer)


def _learning(proof: Proof) -> Learning:
    assert proof.learning is not None, "it is a proof of learning from rewards"
    return proof.learning


def _roles(proof: Proof) -> Roles:
    own, model = _learning(proof), proof.model
    policy = _engine(proof, model, proof.optimizer, 0)
    critic = reference = None
    if own.algorithm == "ppo":
        distributed = {"distributed": proof.optimizer.distributed}
        optimizer = own.critic_optimizer.model_copy(update=distributed)
        valued = RewardArchitecture.upon(model, ("value",))
        critic = OwnCritic(_engine(proof, valued, optimizer, CRITIC_SEED), _lesson(proof))
    if own.kl.wanted:
        frozen = _engine(proof, model, proof.optimizer, REFERENCE_SEED, frozen=True)
        reference = OwnReference(frozen)
    nobody: Any = None
    return Roles(policy=policy, critic=critic, reference=reference, rollout=nobody, scorers=nobody)


def _engine(
    proof: Proof, model: Architecture, optimizer: Optimizer, seed: int, frozen: bool = False
) -> MegatronEngine:
    engine = MegatronEngine(
        model,
        proof.vocabulary,
        proof.parallel,
        optimizer,
        precision=proof.precision,
        recompute=proof.recompute,
        frozen=frozen,
        temperature=1.0 if model.scored else _learning(proof).rollout.temperature,
    )
    fill(engine.chunks, model, proof.vocabulary, proof.seed + seed)
    return engine


def _engines(roles: Roles) -> dict[str, MegatronEngine]:
    found: dict[str, Any] = {"policy": roles.policy}
    if isinstance(roles.critic, OwnCritic):
        found["critic"] = roles.critic.engine
    return found


def _lesson(proof: Proof) -> Lesson:
    own = _learning(proof)
    return Lesson(
        algorithm=own.algorithm,
        steps=proof.steps + 1,
        seed=proof.seed,
        batch=proof.batch,
        rollout=own.rollout,
        kl=own.kl,
        expectation=own.expectation,
        update=own.update,
        checkpointing=Checkpointing(),
        samples_every=1,
    )


def _iteration(proof: Proof, roles: Roles, step: int) -> dict[str, float]:
    lesson, own = _lesson(proof), _learning(proof)
    room = proof.model.sequence_length
    form = RowForm(PADDING, room, math.lcm(2, 2 * proof.parallel.tensor))
    answers, scores = _answered(proof, step)
    coefficient = own.kl.coefficient
    experience, expected, seen = examined(lesson, roles, form, answers, scores, coefficient)
    told = seen | updated(lesson, roles, experience, expected, coefficient, step)
    return {name: told[name] for name in FIGURES if name in told}


def _answered(proof: Proof, step: int) -> tuple[list[Answer], Scores]:
    """Answers of all lengths to prompts of all lengths, as chance has them, and normal scores."""
    own = _learning(proof).rollout
    by_chance = -math.log(proof.vocabulary)
    random = np.random.default_rng([proof.seed, step])
    most = own.max_new_tokens

    def tokens(longest: int) -> tuple[int, ...]:
        length = random.integers(1, longest + 1)
        return tuple(random.integers(FIRST_ORDINARY, proof.vocabulary, length).tolist())

    answers = []
    for number in range(own.prompts):
        prompt = Prompt(str(number), tokens(proof.model.sequence_length - most))
        for _ in range(own.answers):
            given = tokens(most)
            answers.append(Answer(prompt, "", given, (by_chance,) * len(given), len(given) < most))
    return answers, Scores(random.standard_normal(len(answers)).tolist(), {})


def _compared(roles: Roles, reference: Path, step: int) -> list[Difference]:
    found = []
    for name, engine in _engines(roles).items():
        expected = load_file(_tensors(reference, step, name))
        found += differences(engine, expected, parameter_value, step, name)
    return found


def _tensors(folder: Path, step: int, role: str) -> Path:
    return folder / f"{role}-{step}.safetensors"
