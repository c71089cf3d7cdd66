"""Labelled records, prompts of them with examples, and labels out of written answers."""

import json
from pathlib import Path

import pytest

from llmscale.errors import RecipeError
from llmscale.evaluation.classification_form import ClassificationForm, read_task
from llmscale.evaluation.labelled import read_labelled, with_examples
from llmscale.evaluation.prompted import named_label

TEXTS = {"good": " great", "bad": " poor"}


def records(folder: Path, *lines: object) -> Path:
    file = folder / "x.jsonl"
    file.write_text(
        "".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines)
    )
    return file


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{broken", "broken JSON"),
        ("[1]", "no JSON object"),
        ('{"text": "a"}', "missing field: label"),
        ('{"label": "good"}', "missing field: text"),
        ('{"text": 5, "label": "good"}', "wrong field: text is no text"),
        ('{"text": " ", "label": "good"}', "wrong field: text is no text"),
        ('{"text": "a", "label": true}', "wrong field: label is no text"),
        ('{"text": "a", "label": "ugly"}', "unknown label: 'ugly' is none of good, bad"),
        ('{"text": "\\ud800", "label": "bad"}', "half a character"),
    ],
)
def test_a_malformed_record_is_named_by_file_and_line(tmp_path: Path, line: str, says: str) -> None:
    file = records(tmp_path, {"text": "fine", "label": "good"}, "", line)
    with pytest.raises(RecipeError) as error:
        read_labelled(file, ["text"], TEXTS)
    assert str(error.value).startswith(f"{file}:3: {says}")
    assert "\n" not in str(error.value) and "; mend the line" in str(error.value)


def test_files_that_leave_nothing_to_choose_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="holds no record"):
        read_task(ClassificationForm(), records(tmp_path), None)
    one = records(tmp_path, {"text": "a", "label": "good"}, {"text": "b", "label": "good"})
    with pytest.raises(RecipeError, match="all records have one label"):
        read_task(ClassificationForm(), one, None)
    with pytest.raises(RecipeError, match="2 examples, of which 4 are to be shown"):
        read_task(ClassificationForm(labels=TEXTS), one, one)


def test_whole_numbers_are_labels_and_any_field_goes_into_a_template(tmp_path: Path) -> None:
    file = records(
        tmp_path,
        {"passage": "Sky is up.", "question": "Is it {up}?", "label": 1},
        {"passage": "Sea is down.", "question": "Is it up?", "label": 0},
    )
    form = ClassificationForm(template="{passage} {question} Answer:")
    task = read_task(form, file, None)
    assert task.labels == {"0": " 0", "1": " 1"}
    assert task.texts[0].prompt(form.template) == "Sky is up. Is it {up}? Answer:"


def test_examples_are_drawn_by_the_seed_and_never_what_is_asked(tmp_path: Path) -> None:
    lines = [{"text": f"film {n}", "label": "good" if n % 2 else "bad"} for n in range(8)]
    known = read_labelled(records(tmp_path, *lines), ["text"], TEXTS)
    prompts = with_examples(known, known, known, 3, "{text}:", TEXTS, seed=7)
    for one, prompt in zip(known, prompts, strict=True):
        *shown, asked = prompt.split("\n\n")
        assert asked == f"{one.fields['text']}:"
        assert len(shown) == 3
        assert all(not example.startswith(f"{one.fields['text']}:") for example in shown)
        labels = {f"film {n}": TEXTS[line["label"]] for n, line in enumerate(lines)}
        assert all(labels[e.split(":")[0]] == e.split(":")[1] for e in shown)
    assert with_examples(known, known, known, 3, "{text}:", TEXTS, seed=7) == prompts
    assert with_examples(known, known, known, 3, "{text}:", TEXTS, seed=8) != prompts


def test_a_spoilt_text_is_not_asked_behind_itself(tmp_path: Path) -> None:
    lines = [{"text": f"film {n}", "label": "good" if n % 2 else "bad"} for n in range(8)]
    known = read_labelled(records(tmp_path, *lines), ["text"], TEXTS)
    spoilt = [one.with_fields({"text": one.fields["text"].upper()}) for one in known]
    clean = with_examples(known, known, known, 3, "{text}:", TEXTS, seed=7)
    prompts = with_examples(spoilt, known, known, 3, "{text}:", TEXTS, seed=7)
    for one, before, after in zip(spoilt, clean, prompts, strict=True):
        assert after.split("\n\n") == [*before.split("\n\n")[:-1], f"{one.fields['text']}:"]


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("Great. Not poor at all.", "good", "bad"),
        ("It is goodish, poorly so.", "", ""),
        ("I think: BAD!", "bad", "bad"),
        ("", "", ""),
    ],
)
def test_an_answers_label_is_the_whole_word_named_first_or_last(
    text: str, first: str, last: str
) -> None:
    assert named_label(text, TEXTS, last=False) == first
    assert named_label(text, TEXTS, last=True) == last


def test_of_labels_at_one_place_the_longest_is_meant() -> None:
    labels = {"good": " good", "very": " good enough"}
    assert named_label("That is good enough.", labels, last=False) == "very"
