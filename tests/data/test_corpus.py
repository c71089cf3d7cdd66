"""A corpus: cleaned, split without leaks, and streamed."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.data.corpus import read_split, write_corpus
from llmscale.data.documents import Document, cleaned, read_documents
from llmscale.errors import RecipeError


def corpus(folder: Path, texts: list[str], fraction: float, seed: int = 1) -> dict:
    return write_corpus(
        lambda: (Document(text, str(n)) for n, text in enumerate(texts)), folder, fraction, seed
    )


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=40))
def test_no_text_is_on_both_sides_and_none_is_lost(
    texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    corpus(folder, texts, 0.3)
    train, validation = list(read_split(folder, "train")), list(read_split(folder, "validation"))
    assert not set(train) & set(validation)
    wanted = {cleaned(text) for text in texts if cleaned(text).strip()}
    assert set(train) | set(validation) == wanted
    assert len(train) + len(validation) == len(wanted)


def test_few_long_documents_still_give_a_validation_split(tmp_path: Path) -> None:
    counts = corpus(tmp_path, [f"play {n}" for n in range(20)], 1e-9)
    assert counts["validation"]["documents"] == 1
    assert counts["train"]["documents"] == 19


def test_adding_documents_moves_no_other_document_across(tmp_path: Path) -> None:
    few, more = tmp_path / "few", tmp_path / "more"
    few.mkdir()
    more.mkdir()
    corpus(few, [str(n) for n in range(500)], 0.2)
    corpus(more, [str(n) for n in range(1000)], 0.2)
    assert set(read_split(few, "validation")) < set(read_split(more, "validation"))


def test_equal_documents_are_kept_once(tmp_path: Path) -> None:
    counts = corpus(tmp_path, ["a", "b", "a", "a\r\n", "a\n"], 0.0)
    assert counts["train"]["documents"] == 3
    assert counts["left_out"]["duplicates"] == 2


def test_json_lines_are_documents_and_a_bad_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"body": "two"}) + "\n")
    with pytest.raises(RecipeError, match=r"x\.jsonl:3: no JSON object with a text under 'text'"):
        list(read_documents(file))


def test_a_file_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.txt: byte 3 is not UTF-8"):
        list(read_documents(file))
