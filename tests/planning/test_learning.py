"""The plan of learning from rewards: what each role needs, and the parts of an iteration."""

import json
from dataclasses import replace
from typing import Any

import pytest

from llmscale.learning_plans import learning_setup, learning_warnings
from llmscale.planning.constants import Constants
from llmscale.planning.hardware import DEVICES
from llmscale.planning.learning import (
    LearningSetup,
    generation_bytes,
    iteration_time,
    learning_memory,
    whole_bytes,
)
from llmscale.recipe.recipe import load_recipe
from llmscale.stages.ppo import Ppo
from tests.called import llmscale
from tests.conftest import RLHF_LLAMA3

H100 = DEVICES["H100-80GB"]
PARAMETERS = 8_030_261_248
"""Of Llama 3 8B, as Hugging Face counts them."""


def llama3(*overrides: str) -> LearningSetup:
    """The shipped recipe's iteration on 32 H100."""
    recipe = load_recipe(RLHF_LLAMA3, overrides)
    stage = recipe.stages["ppo"]
    assert isinstance(stage, Ppo)
    return learning_setup(recipe, stage, H100, 32)


def test_each_role_needs_what_its_weights_and_optimizer_are() -> None:
    need = learning_memory(llama3())["policy"]
    rank = PARAMETERS / 8
    assert need.policy == pytest.approx((6 + 12 / 4) * rank, rel=0.01), "bf16, distributed over 4"
    head = 128256 * 4096
    assert need.critic == pytest.approx((6 + 12 / 4) * (PARAMETERS - head) / 8, rel=0.01)
    assert need.reference == pytest.approx(2 * rank, rel=0.01)
    assert need.rollout == pytest.approx(2 * PARAMETERS + 16 * 2048 * 128 * 1024), "vLLM's cache"
    assert need.rewards == pytest.approx(2 * (PARAMETERS - head), rel=1e-5)
    assert need.total == pytest.approx(sum(vars(need).values()))


def test_keys_and_values_of_llama3_8b_take_128_kib_a_token() -> None:
    setup = llama3("stages.ppo.rollout.batch=16")
    assert generation_bytes(setup) == pytest.approx(16 * 2048 * 128 * 1024, rel=0.01)


def test_vllm_keeps_its_cache_and_waits_for_no_python() -> None:
    vllm, transformers = llama3(), llama3("stages.ppo.rollout.engine=transformers")
    kept, freed = learning_memory(vllm)["policy"], learning_memory(transformers)["policy"]
    assert kept.rollout > freed.rollout == 2 * PARAMETERS
    faster, slower = iteration_time(vllm, Constants()), iteration_time(transformers, Constants())
    assert faster.rollout < slower.rollout
    assert replace(faster, rollout=slower.rollout) == slower


def test_without_critic_and_reference_nothing_is_kept_for_them() -> None:
    groups = ("stages.ppo.algorithm=grpo", "stages.ppo.critic=null")
    rollout = "stages.ppo.rollout={prompts: 64, answers: 8, max_new_tokens: 1024}"
    setup = llama3(*groups, rollout, "stages.ppo.kl={coefficient: 0.0}")
    need = learning_memory(setup)["policy"]
    assert (need.critic, need.reference) == (0.0, 0.0)


def test_roles_in_groups_are_kept_by_their_ranks_alone() -> None:
    placement = (
        "stages.ppo.placement={writers: {roles: [rollout], parallel: {data: 8}}, "
        "judges: {roles: [reference, rewards], parallel: {tensor: 8}}}"
    )
    together, apart = llama3(), llama3(placement)
    assert {name: group.ranks for name, group in apart.groups.items()} == {
        "policy": 16,
        "writers": 8,
        "judges": 8,
    }
    whole, parts = learning_memory(together)["policy"], learning_memory(apart)
    assert parts["writers"].rollout == whole.rollout and parts["judges"].rewards == whole.rewards
    assert parts["judges"].reference == whole.reference
    assert (parts["policy"].rollout, parts["policy"].reference) == (0.0, 0.0)
    assert parts["writers"].policy == parts["judges"].critic == 0.0
    constants = Constants()
    before, now = iteration_time(together, constants), iteration_time(apart, constants)
    assert now.update > 1.5 * before.update and now.synchronize > before.synchronize
    ahead = iteration_time(replace(apart, ahead=True), constants)
    assert ahead.rollout == pytest.approx(max(0.0, now.rollout - now.update))


def test_a_critic_on_ranks_of_its_own_learns_while_the_policy_does() -> None:
    placement = "stages.ppo.placement={valuers: {roles: [critic], parallel: {tensor: 8, data: 2}}}"
    together, apart = llama3(), llama3(placement, "stages.ppo.parallel={tensor: 8, data: 2}")
    parts, whole = learning_memory(apart), learning_memory(together)["policy"]
    assert (parts["policy"].critic, parts["valuers"].policy) == (0.0, 0.0)
    assert parts["valuers"].critic > whole.critic, "its optimizer is split over fewer copies"
    constants = Constants()
    before, now = iteration_time(together, constants), iteration_time(apart, constants)
    assert now.update == pytest.approx(before.update, rel=0.1), "half the ranks each, at once"


def test_generation_never_beats_the_reading_of_all_weights() -> None:
    setup = llama3()
    seconds = iteration_time(setup, Constants())
    assert seconds.rollout > 1024 * whole_bytes(setup.policy) / H100.memory_bandwidth


def test_an_iteration_takes_longer_with_more_passes_answers_and_roles() -> None:
    setup, constants = llama3(), Constants()
    once = iteration_time(setup, constants)
    assert once.total == pytest.approx(sum(vars(once).values()))
    twice = iteration_time(replace(setup, passes=2 * setup.passes), constants)
    assert twice.update == pytest.approx(2 * once.update)
    assert replace(twice, update=once.update) == once
    more = iteration_time(replace(setup, samples=2 * setup.samples), constants)
    assert more.rollout == pytest.approx(2 * once.rollout)
    assert more.score == pytest.approx(2 * once.score)
    groups = {"policy": replace(setup.groups["policy"], reference=None, critic=None)}
    fewer = iteration_time(replace(setup, groups=groups), constants)
    assert fewer.update < 0.6 * once.update and fewer.examine < 0.4 * once.examine


def test_the_command_tells_what_the_roles_need_and_what_an_iteration_takes() -> None:
    done = llmscale("plan", RLHF_LLAMA3, "--json")
    assert done.returncode == 0, done.stderr
    stages: dict[str, Any] = json.loads(done.stdout)["stages"]
    own = stages["ppo"]["own"]
    assert stages["assistant"]["own"] is not None
    assert stages["ppo"]["parameters"] == PARAMETERS
    (policy,) = own["groups"].values()
    assert policy["fits"] == "fits" and own["layout"]["tensor"] == 8
    sizes = policy["memory_gib"]
    assert sizes["total"] + sizes["headroom"] == pytest.approx(79.6, abs=0.01)
    assert set(own["iteration_seconds"]) == {
        *("rollout", "score", "examine", "update", "synchronize", "total")
    }
    shown = llmscale("plan", RLHF_LLAMA3, "--price", 2)
    for word in ("critic", "rollout", "iteration of 512 answers", "cost of 1,000 iterations"):
        assert word in shown.stdout


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["--gpus", 12], "8 ranks hold a model and do not divide 12 GPUs"),
        (["stages.ppo.adapter={method: lora}"], "stages.ppo.adapter=null"),
        (
            [
                "stages.ppo.placement={all: {roles: [rollout, rewards], parallel: {data: 16}}}",
                "stages.ppo.parallel.data=2",
                *("--gpus", 40),
            ],
            "the policy has 16 ranks and placement's groups 16, not 40 in all; use --gpus 32",
        ),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_line(overrides: list, told: str) -> None:
    done = llmscale("plan", RLHF_LLAMA3, *overrides, "--json")
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)["stages"]["ppo"]
    assert planned["own"] is None and told in planned["why_not"]


def test_run_warns_of_roles_that_do_not_fit() -> None:
    assert learning_warnings(load_recipe(RLHF_LLAMA3)) == []
    cramped = ["stages.ppo.parallel={tensor: 1}", "stages.ppo.optimizer.distributed=false"]
    (line,) = learning_warnings(load_recipe(RLHF_LLAMA3, cramped))
    assert line.startswith("warning: stages.ppo: its roles need about ")
