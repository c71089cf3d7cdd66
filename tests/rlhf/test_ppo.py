"""Whole stages of kind ppo: they learn what is rewarded, and a kill changes nothing."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmscale.artifacts import RunFolder
from llmscale.errors import RecipeError, StageError
from llmscale.recipe.recipe import load_recipe
from tests.ranks import kill_a_rank_after, run_recipe
from tests.rlhf.letters import letters_home

GROUPS = {
    "algorithm": "grpo",
    "rollout": {"prompts": 8, "answers": 8, "max_new_tokens": 16},
    "kl": {"coefficient": 0.0},
    "optimizer": {"learning_rate": 5e-3, "schedule": "constant", "weight_decay": 0.0},
}


def learned(folder: Path, **stage: Any) -> list[dict[str, Any]]:
    """The iterations of a run on one rank."""
    home = letters_home(folder / "home", **stage)
    return iterations(run_recipe(home / "recipe.yaml", folder / "run", []))


def iterations(run: RunFolder) -> list[dict[str, Any]]:
    """What was logged of each, but for times."""
    return [
        {name: value for name, value in line.items() if "second" not in name}
        for line in run.stage("ppo").metrics()
        if "reward" in line
    ]


def test_answers_to_prompts_become_what_is_rewarded(tmp_path: Path) -> None:
    told = learned(tmp_path, **GROUPS, steps=16, samples_every=16)
    assert told[0]["reward"] < 0.08, "a random model knows nothing of it"
    assert told[-1]["reward"] > 0.85
    assert all(line["rollout_disagreement"] < 1e-4 for line in told)
    assert [line["clip_fraction"] for line in told] == [0.0] * 16, "each answer is learned of once"
    stage = RunFolder(tmp_path / "run").stage("ppo").path
    samples = [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 64
    for sample in samples:
        assert sample["reward"] == sample["answer"].split().count("e") / 16
    before, after = (
        [one for one in map(json.loads, (stage / "validation.jsonl").open()) if one["step"] == step]
        for step in (0, 16)
    )
    assert [one["prompt"] for one in before] == [one["prompt"] for one in after]
    asked = {sample["prompt"] for sample in samples}
    assert not asked & {one["prompt"] for one in before}, "held-out prompts are never learned of"


def test_without_steps_of_its_optimizer_a_policy_stays_the_reference(tmp_path: Path) -> None:
    still = {"learning_rate": 1e-30, "schedule": "constant", "weight_decay": 0.0}
    told = learned(tmp_path, optimizer=still, steps=3, update={"passes": 2})
    assert [line["kl"] for line in told] == [0.0] * 3
    assert [line["clip_fraction"] for line in told] == [0.0] * 3
    before = load_file(tmp_path / "home" / "base" / "model.safetensors")
    after = load_file(tmp_path / "run" / "ppo" / "hf" / "model.safetensors")
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-20)


def test_a_heavy_divergence_keeps_the_policy_where_it_is(tmp_path: Path) -> None:
    free = learned(tmp_path / "free", **GROUPS, steps=8)
    heavy = {"coefficient": 100.0, "place": "loss", "estimator": "k3"}
    kept = learned(tmp_path / "kept", **{**GROUPS, "kl": heavy}, steps=8)
    assert kept[-1]["kl"] < 1.0
    assert kept[-1]["reward"] < 0.5 * free[-1]["reward"]


@pytest.mark.ranks
@pytest.mark.parametrize(
    "engine",
    [
        {"parallel": {"tensor": 2}},
        {"engine": "deepspeed", "zero": {"stage": 2}, "parallel": {"data": 2}},
    ],
    ids=["megatron", "deepspeed"],
)
def test_a_killed_policy_goes_on_to_the_same_curve_bit_for_bit(
    engine: dict[str, Any], tmp_path: Path
) -> None:
    home = letters_home(
        tmp_path / "home",
        2,
        steps=7,
        checkpoint={"every": 2},
        kl={"coefficient": 0.1, "target": 0.05, "horizon": 200},
        rollout={"prompts": 24, "max_new_tokens": 6, "without_end": -0.5},
        batch={"global": 12, "micro": 6},
        **engine,
    )
    recipe = home / "recipe.yaml"
    whole = run_recipe(recipe, tmp_path / "whole", [])
    stage = RunFolder(tmp_path / "killed").stage("ppo")
    killer = threading.Thread(target=kill_a_rank_after, args=(stage, 5), daemon=True)
    killer.start()
    with pytest.raises(StageError, match="SIGKILL"):
        run_recipe(recipe, tmp_path / "killed", [])
    killer.join()
    resumed = run_recipe(recipe, tmp_path / "killed", [])
    assert iterations(resumed) == iterations(whole)
    coefficients = [line["kl_coefficient"] for line in iterations(whole)]
    assert len(set(coefficients)) == 7, "the coefficient adapts"
    for name in ("validation.jsonl", "hf/model.safetensors"):
        ours, expected = (run.stage("ppo").path / name for run in (resumed, whole))
        assert ours.read_bytes() == expected.read_bytes()


def test_a_reward_that_is_not_a_number_stops_the_stage_before_it_is_learned(
    tmp_path: Path,
) -> None:
    home = letters_home(tmp_path / "home", **GROUPS, steps=2)
    (home / "rewards.py").write_text("def share(prompts, responses):\n    return [None]\n")
    with pytest.raises(StageError, match=r"rewards\.share: returned list, not numbers"):
        run_recipe(home / "recipe.yaml", tmp_path / "run", [])
    assert not (tmp_path / "run" / "ppo" / "hf").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("batch.global=128", "128 does not divide the 64 answers of an iteration"),
        ("algorithm=rloo", "rloo compares the answers to one prompt; use 2 or more"),
        ("rewards.share.url=http://127.0.0.1:1/", "function and url is given"),
        ("rewards.share.function=rewards.py", "names no function; write MODULE:FUNCTION"),
        ("rewards.share.function=other.py:share", "other.py is no file"),
        ("rewards.share.weight=0.0", "all weights are 0"),
        ("rollout.max_new_tokens=64", "leaves no room for a prompt in 64 tokens"),
        ("rollout.top_p=0.9", "unknown key"),
        ("kl.place=loss", "the gradient of k1 says nothing"),
        ("epochs=2", "steps"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_with_a_mend(
    override: str, said: str, tmp_path: Path
) -> None:
    home = letters_home(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_recipe(home / "recipe.yaml", [f"stages.ppo.{override}"])
    assert said in str(caught.value)


def test_prompts_that_leave_no_room_or_ask_nothing_are_named_by_line(tmp_path: Path) -> None:
    home = letters_home(tmp_path / "home", **GROUPS, steps=1)
    long = " ".join(["a"] * 60)
    (home / "prompts.jsonl").write_text(
        f'{{"prompt": "a"}}\n{{"prompt": " "}}\n{{"prompt": "{long}"}}'
    )
    with pytest.raises(StageError, match=r"prompts\.jsonl:2: empty prompt \(and 1 more"):
        run_recipe(home / "recipe.yaml", tmp_path / "run", [])
