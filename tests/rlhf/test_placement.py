"""Roles on ranks of their own learn what they learn on common ones; killed ranks change nothing."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmscale.artifacts import RunFolder
from llmscale.errors import RecipeError, StageError
from llmscale.parallel.bridge import Seat
from llmscale.parallel.layout import Layout
from llmscale.recipe.recipe import load_recipe
from llmscale.stages.ppo_placement import RankGroup, layouts
from tests.ranks import cut_off_after, kill_a_rank_after, run_recipe
from tests.rlhf.letters import letters_home
from tests.rlhf.test_ppo import GROUPS, iterations

LEARNING = {
    "steps": 6,
    "checkpoint": {"every": 2},
    "kl": {"coefficient": 0.1, "target": 0.05, "horizon": 200},
    "rollout": {"prompts": 24, "max_new_tokens": 6},
    "batch": {"global": 12, "micro": 6},
}
WRITERS = {"writers": {"roles": ["rollout"]}}
JUDGES = {"judges": {"roles": ["reference", "rewards"]}}
VALUERS = {"valuers": {"roles": ["critic"]}}


def placed(folder: Path, ranks: int, **stage: Any) -> Path:
    """A recipe whose roles have ranks of their own."""
    return letters_home(folder, ranks, **{**LEARNING, **stage}) / "recipe.yaml"


@pytest.fixture(scope="module")
def colocated(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """One rank that plays all roles."""
    folder = tmp_path_factory.mktemp("colocated")
    return run_recipe(placed(folder / "home", 1), folder / "run", [])


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("ranks", "stage"),
    [
        (4, {"parallel": {"tensor": 2}, "placement": WRITERS | JUDGES}),
        (3, {"parallel": {"data": 1}, "placement": "separate"}),
        (
            4,
            {
                "engine": "deepspeed",
                "zero": {"stage": 2},
                "parallel": {"data": 2},
                "placement": {"all": {"roles": ["rollout", "reference", "rewards"]}},
            },
        ),
        (3, {"placement": {"judges": {"roles": ["reference"], "parallel": {"tensor": 2}}}}),
        (
            4,
            {
                "parallel": {"tensor": 2},
                "placement": {"valuers": {"roles": ["critic"], "parallel": {"pipeline": 2}}},
            },
        ),
        (
            3,
            {
                "engine": "deepspeed",
                "zero": {"stage": 2},
                "parallel": {"data": 1},
                "placement": {"all": {"roles": ["critic", "reference"]}},
            },
        ),
        (
            4,
            {
                "parallel": {"tensor": 2},
                "placement": {
                    "both": {
                        "roles": ["critic", "reference"],
                        "engine": "deepspeed",
                        "zero": {"stage": 3},
                        "parallel": {"data": 2},
                    }
                },
            },
        ),
    ],
    ids=[
        "tensor 2 and two groups",
        "separate",
        "ZeRO 2",
        "reference at tensor 2",
        "critic at pipeline 2",
        "critic by ZeRO 2",
        "policy by Megatron, critic and reference by ZeRO 3",
    ],
)
def test_roles_on_ranks_of_their_own_learn_as_one_rank_does(
    ranks: int, stage: dict[str, Any], colocated: RunFolder, tmp_path: Path
) -> None:
    run = run_recipe(placed(tmp_path / "home", ranks, **stage), tmp_path / "run", [])
    told, expected = iterations(run), iterations(colocated)
    assert len(told) == len(expected) == 6
    for found, wanted in zip(told, expected, strict=True):
        for name in ("loss", "value_loss", "gradient_norm", "reward", "kl", "kl_coefficient"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name
    ours, theirs = (
        load_file(each.stage("ppo").hf / "model.safetensors") for each in (run, colocated)
    )
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-4)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    "role", [0, 1, 2, 3], ids=["policy", "rollout", "reference and rewards", "critic"]
)
def test_a_killed_rank_of_any_role_changes_nothing(role: int, tmp_path: Path) -> None:
    stage = {"placement": WRITERS | JUDGES | VALUERS, "steps": 12, "checkpoint": {"every": 3}}
    stage["rollout"] = {**LEARNING["rollout"], "ahead": True}
    recipe = placed(tmp_path / "home", 4, **stage)
    whole = run_recipe(recipe, tmp_path / "whole", [])
    folder = RunFolder(tmp_path / "killed")
    for moment in (2, 5, 8):
        killer = threading.Thread(
            target=kill_a_rank_after, args=(folder.stage("ppo"), moment, role), daemon=True
        )
        killer.start()
        with pytest.raises(StageError):
            run_recipe(recipe, folder.path, [])
        killer.join()
    resumed = run_recipe(recipe, folder.path, [])
    assert iterations(resumed) == iterations(whole)
    for name in ("validation.jsonl", "hf/model.safetensors"):
        ours, expected = (run.stage("ppo").path / name for run in (resumed, whole))
        assert ours.read_bytes() == expected.read_bytes()


@pytest.mark.ranks
def test_what_each_role_waits_for_is_told(tmp_path: Path) -> None:
    rewards = {"share": {"function": "rewards.py:share"}}
    recipe = placed(tmp_path / "home", 3, placement=WRITERS | JUDGES, rewards=rewards, steps=2)
    slow = "import time\ndef share(prompts, responses):\n    time.sleep(1)\n"
    (recipe.parent / "rewards.py").write_text(f"{slow}    return [0.5] * len(responses)\n")
    run = run_recipe(recipe, tmp_path / "run", [])
    for line in (line for line in run.stage("ppo").metrics() if "reward" in line):
        assert line["score_seconds"] >= 1
        assert line["waiting_seconds_writers"] >= 1, "nothing was to be answered meanwhile"
        assert line["waiting_seconds_policy"] >= 1
        assert line["waiting_seconds_judges"] < line["step_seconds"]


@pytest.mark.ranks
def test_a_critic_that_moves_to_ranks_of_its_own_goes_on_from_the_same_checkpoint(
    colocated: RunFolder, tmp_path: Path
) -> None:
    recipe = placed(tmp_path / "home", 2)
    overrides = ["cluster.ranks_per_node=1", "stages.ppo.batch.micro=6"]
    run = run_recipe(recipe, tmp_path / "run", overrides)
    cut_off_after(run.stage("ppo"), 4)
    resumed = run_recipe(
        recipe,
        tmp_path / "run",
        ["stages.ppo.batch.micro=6", "stages.ppo.placement={valuers: {roles: [critic]}}"],
    )
    told, expected = iterations(resumed), iterations(colocated)
    assert [line["step"] for line in told] == [line["step"] for line in expected]
    for found, wanted in zip(told, expected, strict=True):
        for name in ("loss", "value_loss", "gradient_norm"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name


@pytest.mark.ranks
def test_a_critic_that_changes_its_engine_is_told_that_its_state_is_another_s(
    tmp_path: Path,
) -> None:
    recipe = placed(tmp_path / "home", 2, placement=VALUERS)
    run = run_recipe(recipe, tmp_path / "run", [])
    cut_off_after(run.stage("ppo"), 4)
    with pytest.raises(StageError, match="critic: was not written by engine deepspeed"):
        run_recipe(recipe, run.path, ["stages.ppo.placement.valuers.engine=deepspeed"])


@pytest.mark.ranks
def test_a_policy_learns_from_answers_that_were_begun_before_its_last_update(
    tmp_path: Path,
) -> None:
    stage = {**GROUPS, "placement": WRITERS, "steps": 20}
    stage["rollout"] = {**GROUPS["rollout"], "ahead": True}
    home = letters_home(tmp_path / "home", 2, **stage)
    told = iterations(run_recipe(home / "recipe.yaml", tmp_path / "run", []))
    assert told[-1]["reward"] > 0.85
    assert "importance_weight" not in told[0], "nothing was learned before the first answers"
    weights = [line["importance_weight"] for line in told[1:]]
    assert all(0.5 < weight <= 2.0 for weight in weights)
    assert max(abs(weight - 1) for weight in weights) > 1e-3, "the policy has moved meanwhile"


@pytest.mark.ranks
def test_a_reward_that_fails_on_ranks_of_its_own_is_named_by_the_policy_s(tmp_path: Path) -> None:
    recipe = placed(tmp_path / "home", 2, placement=JUDGES)
    (recipe.parent / "rewards.py").write_text("def share(prompts, responses):\n    return [1]\n")
    with pytest.raises(StageError, match=r"rewards\.share: 1 scores for 9 answers"):
        run_recipe(recipe, tmp_path / "run", [])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["placement={a: {roles: [rollout]}, b: {roles: [rollout]}}"], "rollout is a's; name it"),
        (["placement={a: {roles: [policy]}}"], "placement.a.roles"),
        (
            ["algorithm=rloo", "rollout.answers=2", "placement={a: {roles: [critic]}}"],
            "only algorithm ppo has a critic",
        ),
        (["placement={a: {roles: [critic], parallel: {tensor: 3}}}"], "3 does not divide 4"),
        (
            ["engine=deepspeed", "placement={a: {roles: [reference], parallel: {tensor: 2}}}"],
            "splits a model by zero alone",
        ),
        (
            [
                "batch={global: 12, micro: 12}",
                "placement={a: {roles: [critic], parallel: {data: 2}}}",
            ],
            "micro 12 x data 2 = 24 does not divide 12",
        ),
        (["placement={a: {roles: [rollout], parallel: {tensor: 2}}}"], "whole on every rank"),
        (["placement={a: {roles: [reference], parallel: {tensor: 3}}}"], "3 does not divide 4"),
        (["placement={a: {roles: [rewards], parallel: {data: 4}}}"], "4 ranks and the policy at"),
        (["parallel={data: 1}", "placement={a: {roles: [rollout]}}", "kl.coefficient=0.1"], ""),
        (["rollout.ahead=true"], "give rollout a group of its own"),
        (["placement=apart"], "placement"),
    ],
)
def test_a_placement_that_cannot_work_is_refused_with_a_mend(
    overrides: list[str], said: str, tmp_path: Path
) -> None:
    home = letters_home(tmp_path, 3)
    stage = [f"stages.ppo.{override}" for override in overrides]
    layout = ["stages.ppo.rollout.prompts=36", "stages.ppo.batch={global: 36, micro: 6}"]
    if not said:
        assert load_recipe(home / "recipe.yaml", [*layout, *stage]).stages
        return
    with pytest.raises(RecipeError) as caught:
        load_recipe(home / "recipe.yaml", [*layout, *stage])
    assert said in str(caught.value)


def test_every_rank_has_a_seat_in_one_group() -> None:
    seats = [Seat.of(rank, [2, 1, 3]) for rank in range(6)]
    assert [(seat.group, seat.rank) for seat in seats] == [
        (0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no group"):
        Seat.of(6, [2, 1, 3])


def test_ranks_that_are_left_go_to_the_policy_or_where_its_number_is_given_to_the_last() -> None:
    groups = {
        "a": RankGroup(roles=("rollout",), parallel=Layout(data=2)),
        "b": RankGroup(roles=("reference",), parallel=Layout(tensor=2)),
    }
    policy, first, last = layouts(Layout(tensor=2), groups, 16)
    assert (policy.data, first.data, last.data) == (6, 2, 1)
    policy, first, last = layouts(Layout(tensor=2, data=2), groups, 16)
    assert (policy.data, first.data, last.data) == (2, 2, 5)
