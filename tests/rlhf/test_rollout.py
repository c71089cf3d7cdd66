"""Answers: sampled from the policy's own distribution, whatever the batch and the ranks."""

import collections
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmscale.rlhf.sampling import NumberedSampler
from tests.ranks import run_ranks
from tests.rlhf.letters import letters_model
from tests.rlhf.programs import half_fed, sampled

PROMPTS = ["a", "b c d e f", "g h", "a a a", "k", "b c d e f", "z y"]
KEYS = [11, 12, 13, 14, 15, 12, 17]
TEMPERATURE = 0.6


WITH_VLLM = pytest.param(
    "vllm",
    marks=pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return letters_model(tmp_path_factory.mktemp("letters") / "model", heads=2)


def answers(model: Path, folder: Path, engine: str, ranks: int, batch: int, **layout: int) -> Any:
    return run_ranks(
        sampled,
        ranks,
        folder,
        model=str(model),
        engine=engine,
        layout=layout,
        temperature=TEMPERATURE,
        batch=batch,
        prompts=PROMPTS,
        keys=KEYS,
    )


@pytest.mark.parametrize("engine", ["transformers", WITH_VLLM])
def test_an_answer_depends_on_its_key_alone_not_on_batch_or_layout(
    engine: str, model: Path, tmp_path: Path
) -> None:
    alone = answers(model, tmp_path / "alone", engine, 1, batch=1)
    together = answers(model, tmp_path / "together", engine, 1, batch=7)
    split = answers(model, tmp_path / "split", engine, 4, batch=2, tensor=2, pipeline=2)
    for other in (together, split):
        assert [one["tokens"] for one in other] == [one["tokens"] for one in alone]
    assert alone[1]["tokens"] == alone[5]["tokens"], "one prompt, one key"
    assert len({tuple(one["tokens"]) for one in alone}) == len(PROMPTS) - 1
    policy = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for prompt, one in zip(PROMPTS, split, strict=True):
        before = tokenizer(prompt, add_special_tokens=False).input_ids
        assert one["ended"] == (one["tokens"][-1] == 3)
        assert 3 not in one["tokens"][:-1]
        with torch.no_grad():
            logits = policy(torch.tensor([before + one["tokens"]])).logits[0, len(before) - 1 : -1]
        expected = (logits / TEMPERATURE).log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(one["tokens"])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(one["log_probabilities"]), chosen)


@pytest.mark.parametrize("engine", ["transformers", WITH_VLLM])
def test_a_weight_that_does_not_come_is_named(engine: str, model: Path, tmp_path: Path) -> None:
    name = "model.norm.weight"
    said = run_ranks(half_fed, 1, tmp_path, model=str(model), engine=engine, left_out=name)
    assert said == f"rank 0: the rollout's weights are not the policy's ({name})"


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = 20_000
    sampler = NumberedSampler(range(draws), temperature=2.0, most=1)
    drawn = sampler(torch.zeros(draws, 1), logits.expand(draws, 4)).argmax(1)
    counts = collections.Counter(drawn.tolist())
    expected = (logits / 2).softmax(0) * draws
    chi_squared = sum((counts[n] - e) ** 2 / e for n, e in enumerate(expected.tolist()))
    assert chi_squared < 16.27, "the 0.1 % point of three degrees of freedom"
