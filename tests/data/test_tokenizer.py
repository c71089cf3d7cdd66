"""Tokenizers: every text comes back, and the end of a text is no padding."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.data.tokenizer import load_tokenizer, train_tokenizer
from llmscale.errors import RecipeError

TEXTS = ["When shall we three meet again? In thunder, lightning, or in rain?"] * 20


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest):
    return train_tokenizer(iter(TEXTS), request.param, 300)


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_every_text_comes_back(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_end_of_a_text_is_not_padding(tokenizer) -> None:
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_a_saved_tokenizer_gives_the_same_tokens(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    text = "When shall we three meet in the rain?"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.eos_token_id == tokenizer.eos_token_id


def test_a_folder_without_a_tokenizer_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(RecipeError, match="no tokenizer can be read there") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_wordpiece_marks_what_it_does_not_know() -> None:
    tokenizer = train_tokenizer(iter(TEXTS), "wordpiece", 100)
    assert tokenizer.unk_token_id in tokenizer("\u4f60")["input_ids"]
