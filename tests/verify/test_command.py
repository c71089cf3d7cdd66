"""``llmscale verify`` as a user runs it."""

import json
from pathlib import Path

import pytest

from tests.called import llmscale
from tests.conftest import PRETRAINING, QUICKSTART, RLHF_LLAMA3, ROOT


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("recipe", PRETRAINING, ids=lambda path: path.stem)
def test_every_shipped_recipe_verifies(recipe: Path) -> None:
    fewer_steps = [] if recipe == QUICKSTART else ["--steps", 1]
    done = llmscale("verify", recipe, *fewer_steps, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["agrees"]
    checks = {check["name"] for proof in answer["proofs"] for check in proof["checks"]}
    assert {"loss", "gradient norm", "gradients", "parameters", "tokens counted"} <= checks
    assert {"checkpoint at one rank", "Hugging Face export"} <= checks


@pytest.mark.ranks
@pytest.mark.slow
def test_the_shipped_recipe_of_learning_from_rewards_verifies() -> None:
    done = llmscale("verify", RLHF_LLAMA3, "--steps", 2, "--json")
    assert done.returncode == 0, done.stderr
    (proof,) = json.loads(done.stdout)["proofs"]
    assert proof["stage"] == "ppo" and proof["ranks"] == 4 and proof["agrees"]
    checks = {check["name"] for check in proof["checks"]}
    assert {"loss", "value loss", "gradient norm", "KL to the reference", "entropy"} <= checks
    assert {"policy's parameters", "critic's parameters", "checkpoint at one rank"} <= checks


@pytest.mark.ranks
@pytest.mark.slow
def test_the_table_is_for_people(tmp_path: Path) -> None:
    one_step = ("stages.pretrain.parallel={data: 2}", "cluster.ranks_per_node=2")
    done = llmscale("verify", QUICKSTART, *one_step, "--steps", 1)
    assert done.returncode == 0
    assert "pretrain: llama, data 2, 2 ranks" in done.stdout
    assert "DIFFERS" not in done.stdout


PARAMETERS = {
    "gpt3-175b-1024xa100": 174_604_259_328,
    "llama3-8b-64xh100": 8_030_261_248,
    "mixtral-8x7b-64xh100": 46_702_792_704,
    "bert-base-8xa100": 109_514_298,
    "t5-base-16xa100": 247_577_856,
}
"""As the published models have them (Hugging Face's count); GPT-3's is 96 * (12 * 12288^2 +
13 * 12288) + (50257 + 2048 + 2) * 12288."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "rank"),
    [
        *(("gpt3-175b-1024xa100", rank) for rank in (0, 512, 1023)),
        *((recipe, 1) for recipe in PARAMETERS if not recipe.startswith("gpt3")),
    ],
)
def test_the_stages_of_a_true_layout_hold_the_published_parameters(recipe: str, rank: int) -> None:
    done = llmscale("verify", "--exact-rank", rank, ROOT / f"recipes/{recipe}.yaml", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)["pretrain"]
    assert answer["rank"] == rank
    assert answer["total_parameters"] == answer["expected_parameters"] == PARAMETERS[recipe]
    layers = sorted(layer for stage in answer["stages"] for layer in stage["layers"])
    assert layers == list(range(len(layers)))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "0"], "llmscale: Invalid value for '--steps'"),
        (["--ranks", "9"], "--ranks: 9 is no choice; use 8 or 16"),
        (["--exact-rank", "8"], "--exact-rank: there is no rank 8; use 0 to 7"),
        (["stages.pretrain.parallel.tensor=3"], "3 does not divide 8 attention heads"),
    ],
)
def test_a_wrong_call_is_answered_in_one_line(arguments: list[str], says: str) -> None:
    done = llmscale("verify", QUICKSTART, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_recipe_without_training_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    recipe = tmp_path / "x.yaml"
    recipe.write_text("name: x\nstages: {c: {kind: prepare, sources: [{path: a.txt}]}}\n")
    done = llmscale("verify", recipe)
    assert done.returncode == 2
    assert done.stderr == (
        "x: no stage of kind pretrain or ppo has engine megatron, whose layouts are what is "
        "proven; add one\n"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--exact-rank", 0], "--exact-rank builds what stages of kind pretrain train"),
        (["stages.ppo.adapter={method: lora}"], "stages.ppo.adapter: layouts are proven of whole"),
    ],
)
def test_what_cannot_be_proven_of_a_policy_is_told_in_one_line(arguments: list, says: str) -> None:
    done = llmscale("verify", RLHF_LLAMA3, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    done = llmscale("verify", tmp_path / "none.yaml")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
