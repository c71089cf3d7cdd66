"""Perplexity: every token counts once, as brute force counts it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from llmscale.data.tokenizer import train_tokenizer
from llmscale.evaluation.perplexity import IGNORED, likelihood, unigram_entropy, windows

TEXT = "Tomorrow, and tomorrow, and tomorrow, creeps in this petty pace from day to day. "


@given(
    tokens=st.lists(st.integers(0, 9), min_size=2, max_size=60),
    length=st.integers(2, 20),
    data=st.data(),
)
def test_every_token_but_the_first_is_scored_once(tokens, length, data) -> None:
    stride = data.draw(st.integers(1, length))
    # A window's first label has nothing before it in the window: no model can score it.
    assert all(labels[0] == IGNORED for _, labels in windows(tokens, length, stride))
    scored = [
        label
        for _, labels in windows(tokens, length, stride)
        for label in labels
        if label != IGNORED
    ]
    assert scored == tokens[1:]


@pytest.mark.parametrize(("length", "stride"), [(64, 64), (16, 8), (16, 5), (7, 1)])
def test_strided_likelihood_equals_scoring_one_token_at_a_time(length: int, stride: int) -> None:
    tokenizer = train_tokenizer(iter([TEXT] * 5), "bpe", 300)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    text = TEXT
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    ours = likelihood(model, tokenizer, [text], length=length, stride=stride)
    expected, scored_to = 0.0, 1
    step = min(stride, length - 1)
    for begin in range(0, len(ids), step):
        for end in range(max(scored_to, begin + 1), min(begin + length, len(ids))):
            with torch.no_grad():
                logits = model(torch.tensor([ids[begin:end]])).logits[0, -1]
            expected -= float(logits.log_softmax(-1)[ids[end]])
            scored_to = end + 1
    assert ours.tokens == len(ids) - 1
    assert ours.nats == pytest.approx(expected, rel=1e-4)
    assert ours.metrics()["bits_per_byte"] == pytest.approx(
        expected / math.log(2) / len(text.encode()), rel=1e-4
    )


def test_the_entropy_of_a_uniform_distribution_is_its_logarithm() -> None:
    assert unigram_entropy([7] * 32) == pytest.approx(math.log(32))
    assert unigram_entropy([5, 0, 0]) == 0
