"""Records: every one that cannot be used is named by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmscale.data.conversations import Turn, conversation
from llmscale.data.records import Intake, read_records
from llmscale.errors import RecipeError

GOOD = {"prompt": "What is up?", "response": "The sky."}
MALFORMED = {
    '{"prompt": "a", "response": ': "broken JSON: Expecting value: line 1 column 29 (char 28)",
    '["a"]': "no JSON object",
    '{"text": "a"}': "missing field: none of messages, instruction, prompt",
    '{"prompt": "a"}': "missing field: response",
    '{"prompt": "a", "response": 3}': "wrong field: response: Input should be a valid string",
    '{"prompt": "a", "response": " \\n"}': "empty answer",
    '{"instruction": "a", "output": ""}': "empty answer",
    '{"messages": [{"role": "user", "content": "a"}]}': "no assistant turn",
    '{"messages": []}': "no assistant turn",
    '{"prompt": "a", "response": "\\ud800"}': (
        "half a character: a lone surrogate, which is no text"
    ),
    '{"messages": [{"role": "assistant", "content": "a"}]}': (
        "nobody asks: the first turn is the assistant's"
    ),
    '{"messages": [{"role": "robot", "content": "a"}]}': (
        "wrong field: messages.0.role: Input should be 'system', 'user' or 'assistant'"
    ),
}


@pytest.mark.parametrize("line", MALFORMED)
def test_a_malformed_record_is_named_with_file_and_line(line: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{line}\n{json.dumps(GOOD)}\n")
    intake = Intake()
    assert len(list(intake.made(conversation, file))) == 2
    with pytest.raises(RecipeError) as refused:
        intake.close(tmp_path, "refuse", "stages.s.malformed")
    assert str(refused.value) == (
        f"{file}:3: {MALFORMED[line]}; mend the file, or set stages.s.malformed=skip"
    )


def test_skipped_records_are_counted_by_kind_and_all_written_down(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(MALFORMED) + "\n")
    intake = Intake()
    assert list(intake.made(conversation, file)) == []
    intake.close(tmp_path, "skip", "stages.s.malformed")
    assert intake.counts() == {
        "broken JSON": 1,
        "no JSON object": 1,
        "missing field": 2,
        "wrong field": 2,
        "empty answer": 2,
        "no assistant turn": 2,
        "half a character": 1,
        "nobody asks": 1,
    }
    told = (tmp_path / "malformed.txt").read_text().splitlines()
    assert told == [f"{file}:{n}: {why}" for n, why in enumerate(MALFORMED.values(), 1)]


def test_a_byte_that_is_not_utf8_is_refused_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(RecipeError, match="byte 7 is not UTF-8"):
        list(read_records(file))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(values=st.lists(JSON_VALUES, max_size=5), indent=st.sampled_from([None, 0, 3]))
def test_an_array_is_read_item_by_item_with_the_line_each_begins_on(
    values: list[Any], indent: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("array") / "data.json"
    text = "\n" + json.dumps(values, indent=indent)
    file.write_text(text, encoding="utf-8")
    read = list(read_records(file))
    assert [record.value for record in read] == values
    lines = text.split("\n")
    for record in read:
        rest = "\n".join(lines[record.line - 1 :]).lstrip(" ")
        found, _ = json.JSONDecoder().raw_decode(rest) if indent is not None else (None, 0)
        assert indent is None or found == record.value


def test_the_rest_of_an_array_behind_a_broken_item_is_named_not_guessed_at(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text('[\n{"prompt": "a", "response": "b"},\n{"prompt": nonsense},\n{}]')
    first, second = read_records(file)
    assert (first.line, second.line) == (2, 3)
    assert str(second.value).startswith("broken JSON")


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1},\n',
        '[{"a": 1}',
        '[{"a": 1}]\n{"b": 2}\n',
        '["x"]\n["y"]\n',
        '[{"a": 1} {"b": 2}]',
        '[{"a": 1},, {"b": 2}]',
        '[{"a": 1},]',
        "[" * 100_000,
    ],
)
def test_an_array_that_is_cut_off_or_goes_on_is_never_taken_for_whole(
    text: str, tmp_path: Path
) -> None:
    file = tmp_path / "data.json"
    file.write_text(text)
    *_, last = read_records(file)
    assert str(last.value).startswith("broken JSON"), last


def test_alpaca_chat_and_prompt_records_say_the_same() -> None:
    asked, answered = Turn("user", "Add these.\n\n1 and 2"), Turn("assistant", "3")
    records = [
        {"instruction": "Add these.", "input": "1 and 2", "output": "3", "text": "left alone"},
        {"prompt": "Add these.\n\n1 and 2", "response": "3"},
        {"messages": [asked._asdict(), answered._asdict()]},
    ]
    assert [conversation(record) for record in records] == [(asked, answered)] * 3
    assert conversation({"instruction": "Add.", "input": " ", "output": "3"})[0].content == "Add."
