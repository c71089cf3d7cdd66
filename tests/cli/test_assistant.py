"""A real model is imported, learns a little by the shipped recipes, answers, and is judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ASSISTANT, REWARD

A_LITTLE = {
    "steps": "2",
    "optimizer.warmup_steps": "0",
    "batch": "{global: 2, micro: 1}",
    "validation.samples": "2",
    "checkpoint.every": "2",
}


def a_little(stage: str, model: Path, **more: str) -> list[str]:
    """Overrides that leave little to do."""
    settings = {**A_LITTLE, **more, "start_from": str(model)}
    return [f"stages.{stage}.{key}={value}" for key, value in settings.items()]


def llmscale(*arguments: object) -> str:
    command = [sys.executable, "-m", "llmscale", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.ranks
@pytest.mark.slow
def test_the_assistant_is_taught_and_answers(smollm2: Path, tmp_path: Path) -> None:
    overrides = a_little("assistant", smollm2)
    shown = llmscale("show", ASSISTANT, *overrides)
    assert "method: lora" in shown
    run = tmp_path / "run"
    told = json.loads(llmscale("run", ASSISTANT, *overrides, "--run-dir", run, "--json"))
    counts = told["metrics"]["assistant"]["examples"]["shakespeare"]
    assert counts["train"] + counts["validation"] == 589
    config = json.loads((run / "assistant/hf/adapter/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 8)
    answer = llmscale(
        *("generate", f"{run}:assistant", "--max-new-tokens", 12),
        *("--prompt", "What is the capital of France?"),
    )
    assert "Paris" in answer
    assert "<|im_" not in answer


@pytest.mark.ranks
@pytest.mark.slow
def test_a_reward_model_learns_from_ratings_and_ranks_answers(
    smollm2: Path, tmp_path: Path
) -> None:
    overrides = a_little("reward", smollm2, normalization_samples="2")
    run, ranked = tmp_path / "run", tmp_path / "ranked.jsonl"
    told = json.loads(llmscale("run", REWARD, *overrides, "--run-dir", run, "--json"))
    counts = told["metrics"]["reward"]["examples"]["reviews"]
    assert counts["train"] > 10_000 and counts["validation"] > 250
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Say something.\n")
    answer = llmscale(
        *("rank", smollm2, "--prompts", prompts, "--reward", f"{run}:reward", "--best-of", 3),
        *("--max-new-tokens", 4, "--out", ranked, "--json"),
    )
    [one] = json.loads(answer)["prompts"]
    assert one["scores"] == sorted(one["scores"], reverse=True)
    assert json.loads(ranked.read_text()) == one
    command = [sys.executable, "-m", "llmscale", "generate", f"{run}:reward", "--prompt", "a"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2
    assert "it scores texts, and does not go on from one" in refused.stderr
