"""The shipped recipe, made small: pretraining, reward model, PPO, and a judge beside."""

from pathlib import Path

import pytest

from llmscale.artifacts import read_json
from tests.conftest import RLHF
from tests.ranks import run_recipe

SMALL = [
    "stages.pretrain.model.layers=2",
    "stages.pretrain.model.hidden_size=32",
    "stages.pretrain.model.ffn_size=64",
    "stages.pretrain.validation.samples=8",
    "stages.pretrain.optimizer.warmup_steps=0",
    "stages.pretrain.steps=2",
    "stages.reward.validation.samples=8",
    "stages.reward.optimizer.warmup_steps=0",
    "stages.reward.steps=2",
    "stages.ppo.validation.samples=8",
    "stages.ppo.rollout.max_new_tokens=8",
    "stages.ppo.steps=2",
]


@pytest.mark.ranks
def test_the_shipped_chain_runs_from_sentences_to_a_judged_policy(tmp_path: Path) -> None:
    run = run_recipe(RLHF, tmp_path / "run", SMALL)
    stage = run.stage("ppo")
    judged = [line for line in stage.metrics() if "validation_reward" in line]
    assert [line["step"] for line in judged] == [0, 2]
    for line in judged:
        assert -1 <= line["validation_reward_judge"] <= 1
    assert read_json(stage.manifest_file)["status"] == "finished"
    assert (stage.hf / "model.safetensors").is_file()
