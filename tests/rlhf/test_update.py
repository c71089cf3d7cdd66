"""One update on fixed answers is the same PPO at every layout, and a plain loop's."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from llmscale.rlhf.batches import Experience, PolicyObjective
from llmscale.training.rows import Rows
from tests.ranks import run_ranks
from tests.rlhf.letters import LETTERS, letters_home
from tests.rlhf.plain_ppo import Answered, PlainPpo
from tests.rlhf.plain_rloo import PlainRloo
from tests.rlhf.programs import learn_from_answers

STEPS, PASSES, TEMPERATURE, BETA, RATE, CLIP = 2, 2, 0.7, 0.1, 3e-3, 0.5
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {"batch": {"global": 12, "micro": 4}},
    "data 2": {"parallel": {"data": 2}, "batch": {"global": 12, "micro": 1}},
    "tensor 2 x pipeline 2": {
        "parallel": {"tensor": 2, "pipeline": 2},
        "batch": {"global": 12, "micro": 3},
    },
    "ZeRO 2": {
        "engine": "deepspeed",
        "zero": {"stage": 2},
        "parallel": {"data": 2},
        "batch": {"global": 12, "micro": 2},
    },
}
OPTIMIZER = {
    "learning_rate": RATE,
    "schedule": "constant",
    "weight_decay": 0.0,
    "beta2": 0.999,
    "epsilon": 1e-5,
    "gradient_clip": CLIP,
}
RANKS = {"one rank": 1, "data 2": 2, "tensor 2 x pipeline 2": 4, "ZeRO 2": 2}


def answers_to_all(seed: int) -> dict[str, list[int]]:
    """An answer of any length to each prompt, by its text; token 3 ends it, 0 is padding."""
    lot = random.Random(seed)
    found = {}
    for one in LETTERS[:8]:
        for other in LETTERS[8:16]:
            tokens = [lot.randrange(4, 30) for _ in range(lot.randint(1, 8))]
            found[f"{one} {other}"] = [*tokens, 3] if len(tokens) < 8 else tokens
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, and a critic that is a model of its own."""
    folder = letters_home(tmp_path_factory.mktemp("letters"))
    torch.manual_seed(5)
    config = LlamaConfig.from_pretrained(folder / "base", num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(folder / "critic")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "critic")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_on_fixed_answers_equal_plain_pytorch(
    home: Path, tmp_path: Path, layout: str
) -> None:
    answers = answers_to_all(3)
    run = tmp_path / "home"
    letters_home(
        run,
        RANKS[layout],
        start_from=str(home / "base"),
        critic={"start_from": str(home / "critic")},
        rewards={"weighed": {"function": "tests.rlhf.programs:weighed"}},
        rollout={"prompts": 12, "max_new_tokens": 8, "temperature": TEMPERATURE},
        kl={"coefficient": BETA},
        update={"passes": PASSES},
        optimizer=OPTIMIZER,
        steps=STEPS,
        **LAYOUTS[layout],
    )
    told = run_ranks(
        learn_from_answers,
        RANKS[layout],
        tmp_path / "run",
        recipe=str(run / "recipe.yaml"),
        answers=answers,
    )
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    plain = PlainPpo(
        home / "base",
        home / "critic",
        rate=RATE,
        beta=BETA,
        temperature=TEMPERATURE,
        clip=CLIP,
    )
    for figures in told:
        own = [answers[prompt] for prompt in figures["asked"]]
        answered = Answered(
            [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in figures["asked"]],
            own,
            [sum(tokens) / 100 for tokens in own],
        )
        expected = plain.learn(answered, PASSES)[-1]
        for name, value in expected.items():
            assert figures[name] == pytest.approx(value, abs=1e-5, rel=1e-5), name
    for name, model in (("policy", plain.policy), ("critic", plain.critic)):
        found = load_whole(tmp_path / "run" / name)
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(found[key], parameter.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_only_update_by_own_answers_with_a_penalty_equals_plain_pytorch(
    home: Path, tmp_path: Path, layout: str
) -> None:
    run, steps = tmp_path / "home", 3
    letters_home(
        run,
        RANKS[layout],
        algorithm="rloo",
        start_from=str(home / "base"),
        rollout={"prompts": 3, "answers": 4, "max_new_tokens": 8, "temperature": TEMPERATURE},
        kl={"coefficient": BETA},
        optimizer=OPTIMIZER,
        steps=steps,
        **LAYOUTS[layout],
    )
    told = run_ranks(
        learn_from_answers,
        RANKS[layout],
        tmp_path / "run",
        recipe=str(run / "recipe.yaml"),
        answers=None,
    )
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    plain = PlainRloo(
        home / "base", rate=RATE, beta=BETA, temperature=TEMPERATURE, clip=CLIP, each=4
    )
    assert len(told) == steps
    for figures in told:
        prompts = [tokenizer(p, add_special_tokens=False).input_ids for p in figures["asked"]]
        expected = plain.learn(Answered(prompts, figures["said"], figures["scores"]))
        for name, value in expected.items():
            assert figures[name] == pytest.approx(value, abs=1e-5, rel=1e-5), name
        assert figures["rollout_disagreement"] < 1e-5
    assert told[-1]["kl"] > 1e-3, "the policy has moved"
    found = load_whole(tmp_path / "run" / "policy")
    for key, parameter in plain.policy.named_parameters():
        torch.testing.assert_close(found[key], parameter.detach(), rtol=1e-4, atol=1e-5)


def test_an_update_that_sees_its_answers_first_is_the_one_that_was_told_of_them() -> None:
    torch.manual_seed(1)
    known_bs, rollout_bs, advantages_bs = torch.randn(3, 4, 5)
    rows = Rows(*(torch.ones(4, 5, dtype=torch.long) for _ in range(5)))
    objective = PolicyObjective(
        clip=0.2, dual_clip=3.0, kl_weight=0.0, kl_estimator="k3", entropy_weight=0.1
    )

    def learned(sampled_bs: torch.Tensor | None) -> tuple[torch.Tensor, dict[str, float]]:
        experience = Experience(rows, sampled_bs, rollout_bs, advantages_bs)
        batch = experience.policy_batch(range(4), objective)
        outputs_bs = (-known_bs).requires_grad_()
        found = batch.loss(outputs_bs)
        (gradient_bs,) = torch.autograd.grad(found.total, outputs_bs)
        means = (found.told / found.count).tolist()
        told = dict(zip(batch.figures, means, strict=True))
        return gradient_bs, {"loss": found.total.item(), **told}

    (expected_bs, wanted), (gradient_bs, told) = learned(known_bs), learned(None)
    assert torch.equal(gradient_bs, expected_bs)
    assert told["loss"] == wanted["loss"]
    assert told["entropy"] == pytest.approx(-known_bs.mean().item())
    apart = ((rollout_bs.exp() - known_bs.exp()) / known_bs.exp()).abs().mean().item()
    assert told["rollout_disagreement"] == pytest.approx(apart, rel=1e-5)
    assert told["clip_fraction"] == told["update_kl"] == 0.0


def load_whole(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder."""
    files = folder.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
