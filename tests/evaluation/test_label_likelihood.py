"""Labels by their likelihood: as a plain loop over transformers finds it, at any batch size."""

import copy

import numpy as np
import pytest
import torch

from llmscale.errors import RecipeError
from llmscale.evaluation.label_likelihood import continuation, label_likelihoods
from llmscale.evaluation.models import load_model
from llmscale.evaluation.perplexity import likelihoods
from tests.models_on_disk import WORDS, small_llama

PROMPTS = [
    "what is up?",
    "ask and answer: what is down? the",
    "add one and two: ",
    "up",
    "the sea;",
]
LABELS = [" sky", " the sea.", " three and more"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    return load_model(small_llama(tmp_path_factory.mktemp("llama") / "model"))


@torch.no_grad()
def plain_nats(model, tokenizer, prompt: str, label: str) -> tuple[float, int]:
    """One text, no padding, a token at a time."""
    before = prompt.rstrip()
    whole = tokenizer(prompt + label, return_tensors="pt")["input_ids"]
    first = len(tokenizer(before)["input_ids"])
    logits_sv = model(whole).logits[0]
    nats = 0.0
    for place in range(first, whole.shape[1]):
        nats += float(torch.log_softmax(logits_sv[place - 1], 0)[whole[0, place]])
    return nats, whole.shape[1] - first


def test_likelihoods_equal_a_plain_loop_over_transformers(loaded: tuple) -> None:
    model, tokenizer = loaded
    found = label_likelihoods(model, tokenizer, PROMPTS, LABELS, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        for column, label in enumerate(LABELS):
            nats, tokens = plain_nats(model, tokenizer, prompt, label)
            assert found.nats_nl[row, column] == pytest.approx(nats, rel=1e-4)
            assert found.tokens_nl[row, column] == tokens
    assert found.scores("tokens") == pytest.approx(found.nats_nl / found.tokens_nl)
    assert found.scores("bytes")[:, 1] == pytest.approx(found.nats_nl[:, 1] / len(" the sea."))


@pytest.mark.parametrize("tokens_a_pass", [1, 20, 64])
def test_likelihoods_are_the_same_at_any_batch_size(loaded: tuple, tokens_a_pass: int) -> None:
    model, tokenizer = loaded
    expected = label_likelihoods(model, tokenizer, PROMPTS, LABELS, PROMPTS)
    found = label_likelihoods(
        model, tokenizer, PROMPTS, LABELS, PROMPTS, tokens_a_pass=tokens_a_pass
    )
    np.testing.assert_allclose(found.nats_nl, expected.nats_nl, rtol=1e-5)


@pytest.mark.parametrize("tokens_a_pass", [1, 40, 100])
def test_perplexity_is_the_same_at_any_batch_size(loaded: tuple, tokens_a_pass: int) -> None:
    model, tokenizer = loaded
    texts = [WORDS * 3, "", "up", WORDS]
    options = {"length": 16, "stride": 7}
    expected = likelihoods(model, tokenizer, texts, **options)
    found = likelihoods(model, tokenizer, texts, **options, tokens_a_pass=tokens_a_pass)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.nats == pytest.approx(other.nats, rel=1e-5)
    alone = likelihoods(model, tokenizer, texts[3:], **options)
    assert alone[0].nats == pytest.approx(expected[3].nats, rel=1e-5)


def test_tokens_of_prompt_and_label_are_those_of_the_whole_text(loaded: tuple) -> None:
    _, tokenizer = loaded
    cut = continuation(tokenizer, "what is up? ", "sky")
    assert [*cut.before, *cut.tokens] == tokenizer("what is up? sky")["input_ids"]
    assert tokenizer.decode(cut.tokens) == " sky"
    nothing_before = continuation(tokenizer, "", "sky")
    assert len(nothing_before.before) == 1 and tokenizer.decode(nothing_before.tokens) == "sky"


def test_a_prompt_longer_than_the_model_is_named_with_its_place(loaded: tuple) -> None:
    model, tokenizer = loaded
    long = "what is up? " * 40
    with pytest.raises(RecipeError, match=r"x\.jsonl:2: .* tokens .* takes 64; shorten it"):
        label_likelihoods(model, tokenizer, ["up", long], LABELS, ["x.jsonl:1", "x.jsonl:2"])


def test_answers_that_are_not_numbers_are_refused(loaded: tuple) -> None:
    model, tokenizer = loaded
    spoilt = copy.deepcopy(model)
    with torch.no_grad():
        spoilt.get_input_embeddings().weight[:] = float("nan")
    with pytest.raises(RecipeError, match=r"x\.jsonl:1: the model's answer is not a number"):
        label_likelihoods(spoilt, tokenizer, ["up"], LABELS, ["x.jsonl:1"])
