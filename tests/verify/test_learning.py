"""Learning from rewards is proven by its own rules, at any layout, and an error is found."""

from typing import Any

import pytest

from llmscale.clusters.base import Job
from llmscale.models.architecture import Architecture
from llmscale.stages.ppo import Ppo
from llmscale.verify import prove as proving
from llmscale.verify.proof import Proof, learning_proofs
from llmscale.verify.rank import LAYOUT, prove_rank

GROUPS = {"prompts": 64, "answers": 8, "max_new_tokens": 128}


def stage(**settings: Any) -> Ppo:
    """A stage of a policy with 8 heads."""
    given = {
        "kind": "ppo",
        "start_from": "base",
        "data": {"asked": {"path": "prompts.jsonl"}},
        "rewards": {"people": {"model": "reward"}},
        "rollout": {"prompts": 512, "max_new_tokens": 128},
        "batch": {"global": 128, "micro": 4},
        "optimizer": {"learning_rate": 1e-6, "warmup_steps": 50, "distributed": True},
        "steps": 500,
        **settings,
    }
    return Ppo.model_validate(given)


def proofs(ppo: Ppo, ranks: int, steps: int = 2) -> list[Proof]:
    """Of a policy of 16 layers."""
    model = Architecture(
        layers=16, hidden_size=1024, attention_heads=8, ffn_size=4096, sequence_length=2048
    )
    return learning_proofs(ppo, model, ranks, steps=steps, most_ranks=8)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo", "reinforce"])
def test_a_proof_keeps_the_rules_of_learning_and_deals_whole_updates(algorithm: str) -> None:
    own = stage(
        algorithm=algorithm,
        rollout=GROUPS,
        kl={"coefficient": 0.1, "estimator": "k3", "place": "loss"},
        update={"passes": 4, "dual_clip": 3.0, "target_kl": 0.1},
        parallel={"tensor": 4, "data": 8},
    )
    (proof,) = proofs(own, 32)
    learning = proof.learning
    assert learning is not None
    assert (learning.algorithm, learning.kl) == (algorithm, own.kl)
    assert learning.update == own.update.model_copy(update={"passes": 2, "target_kl": None})
    assert learning.rollout.answers == 2
    assert learning.rollout.samples == 2 * proof.batch.global_, "several updates a pass"
    assert proof.optimizer.warmup_steps == 0, "the first steps change weights"
    assert Proof.model_validate(proof.model_dump(mode="json", by_alias=True)) == proof


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "grpo", "rollout": GROUPS, "parallel": {"pipeline": 2, "data": 2}},
        {"parallel": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}, "recompute": "full"},
    ],
    ids=["grpo", "ppo"],
)
def test_layouts_learn_alike(settings: dict[str, Any]) -> None:
    (proof,) = proofs(stage(**settings), 4)
    proven = proving.prove("ppo", proof)
    assert proven.agrees, proven.failure()
    roles = {check.name for check in proven.checks if check.name.endswith("parameters")}
    critic = {"critic's parameters"} if proof.learning and proof.learning.algorithm == "ppo" else {}
    assert roles == {"policy's parameters", *critic}


def weighed_by_rank(job: Job, rank: int, rendezvous: str) -> None:
    """As ``prove_rank``, but each data rank of the layout weighs advantages otherwise."""
    from dataclasses import replace

    from llmscale.verify import learning

    right = learning.examined

    def wrong(lesson: Any, roles: Any, *rest: Any) -> Any:
        experience, expected, told = right(lesson, roles, *rest)
        weight = 1.0 + 0.01 * roles.policy.data_rank
        weighed = replace(experience, advantages_ns=weight * experience.advantages_ns)
        return weighed, expected, told

    if job.task.name == LAYOUT:
        learning.examined = wrong
    try:
        prove_rank(job, rank, rendezvous)
    finally:
        learning.examined = right


@pytest.mark.ranks
@pytest.mark.slow
def test_advantages_that_differ_between_ranks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving, "prove_rank", weighed_by_rank)
    (proof,) = proofs(stage(parallel={"data": 2}), 2, steps=1)
    proven = proving.prove("ppo", proof)
    checks = {check.name: check for check in proven.checks}
    assert not checks["gradient norm"].agrees and not checks["policy's parameters"].agrees
    assert checks["value loss"].agrees and checks["critic's parameters"].agrees
    assert "gradient norm differs by" in proven.failure()
