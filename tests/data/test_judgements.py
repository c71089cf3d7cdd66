"""Judgements: read in every usual form, and what cannot be used is named."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmscale.data.chat import Example
from llmscale.data.conversations import Turn
from llmscale.data.groups import Group, Groups, write_groups
from llmscale.data.judgements import Contradictions, Judgement, Response, judgement
from llmscale.data.records import Intake, Malformed
from llmscale.stages.judged import Compare
from llmscale.stages.judgements import Encoded, compared

ASKED = (Turn("user", "up?"),)
MESSAGES = [{"role": "user", "content": "up?"}]
MALFORMED = {
    '{"prompt": "a", "chosen": "b"}': "missing field: rejected",
    '{"prompt": "a"}': "missing field: none of chosen, responses, score, label",
    '{"prompt": "a", "chosen": "b", "rejected": ""}': "empty answer",
    '{"chosen": " ", "rejected": "b"}': "empty answer",
    '{"prompt": "a", "chosen": "b", "rejected": "b"}': (
        "equal responses: two that are compared are the same"
    ),
    '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1}': (
        "wrong field: margin: Input should be greater than or equal to 0"
    ),
    '{"prompt": "a", "responses": ["b"]}': (
        "wrong field: responses: List should have at least 2 items after validation, not 1"
    ),
    '{"response": "b", "score": NaN}': "wrong field: score: Input should be a finite number",
    '{"response": "b", "label": 3}': "wrong field: label: Input should be a valid boolean",
    json.dumps({"chosen": MESSAGES, "rejected": MESSAGES}): "no assistant turn",
    json.dumps(
        {
            "chosen": [*MESSAGES, {"role": "assistant", "content": "the sky"}],
            "rejected": [
                {"role": "user", "content": "down?"},
                {"role": "assistant", "content": "the sea"},
            ],
        }
    ): "different prompts: what is compared answers different prompts",
}


@pytest.mark.parametrize("line", MALFORMED)
def test_a_malformed_judgement_is_named_with_file_and_line(line: str, tmp_path: Path) -> None:
    file = tmp_path / "judged.jsonl"
    file.write_text(f"\n{line}\n")
    intake = Intake()
    assert list(intake.made(judgement, file)) == []
    [(place, problem)] = intake.problems
    assert (place, str(problem)) == (f"{file}:2", MALFORMED[line])


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "up?", "chosen": "the sky", "rejected": "the sea"},
        {
            "prompt": MESSAGES,
            "chosen": [{"role": "assistant", "content": "the sky"}],
            "rejected": [{"role": "assistant", "content": "the sea"}],
        },
        {
            "chosen": [*MESSAGES, {"role": "assistant", "content": "the sky"}],
            "rejected": [*MESSAGES, {"role": "assistant", "content": "the sea"}],
        },
    ],
)
def test_a_pair_is_the_same_in_every_form(record: dict[str, object]) -> None:
    made = judgement(record)
    assert [one.turns for one in made.responses] == [
        (*ASKED, Turn("assistant", "the sky")),
        (*ASKED, Turn("assistant", "the sea")),
    ]


def pair(chosen: str, rejected: str) -> Judgement:
    return judgement({"prompt": "p", "chosen": chosen, "rejected": rejected})


def test_a_pair_that_contradicts_an_earlier_one_names_it() -> None:
    said = Contradictions()
    said.check("f:1", pair("a", "b"))
    said.check("f:2", pair("a", "b"))
    said.check("f:3", judgement({"prompt": "other", "chosen": "b", "rejected": "a"}))
    with pytest.raises(Malformed, match="opposite of an earlier pair: f:1"):
        said.check("f:4", pair("b", "a"))
    with pytest.raises(Malformed, match="opposite of an earlier pair: f:1"):
        said.check("f:5", judgement({"prompt": "p", "responses": ["c", "b", "a"]}))


def test_a_label_or_score_that_contradicts_an_earlier_one_names_it() -> None:
    said = Contradictions()
    for key, first, second in [("label", True, False), ("score", 1, 2)]:
        said.check("f:1", judgement({"response": "a", key: first}))
        said.check("f:2", judgement({"response": "a", key: first}))
        with pytest.raises(Malformed, match="opposite of an earlier judgement: f:1"):
            said.check("f:3", judgement({"response": "a", key: second}))


def scored(answer: str, score: float) -> Encoded:
    text = Example(np.array([len(answer)], np.int32), np.array([False]))
    return Encoded(Judgement("scores", (Response(text=answer),), target=score), (text,))


@given(
    scores=st.lists(st.floats(-4, 4), max_size=30),
    difference=st.floats(0.1, 3),
    each=st.integers(1, 3),
)
def test_pairs_of_scored_texts_differ_enough_and_no_two_are_the_same(
    scores: list[float], difference: float, each: int
) -> None:
    texts = [scored(f"text {number}", score) for number, score in enumerate(scores)]
    how = Compare(difference=difference, pairs_each=each)
    pairs = compared(texts, how, seed=1)
    of = {f"text {number}": score for number, score in enumerate(scores)}
    found = [tuple(one.answer for one in made.judgement.responses) for made in pairs]
    assert all(of[better] - of[worse] >= difference for better, worse in found)
    assert len({frozenset(two) for two in found}) == len(found)
    possible = any(a - b >= difference for a in scores for b in scores)
    assert bool(found) == possible
    assert compared(texts[::-1], how, seed=1) == pairs, "the order of the files does not count"


def test_groups_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    def text(length: int) -> Example:
        return Example(np.arange(length, dtype=np.int32), np.arange(length) > 1)

    written = [Group((text(3), text(1)), margin=0.5), Group((text(4),), target=-1.5)]
    write_groups(written, tmp_path / "groups.safetensors")
    read = Groups(tmp_path / "groups.safetensors", head=1, references=np.array([-1.0, -2.0, -3.0]))
    assert len(read) == 2
    for number, (group, references) in enumerate(zip(written, [(-1, -2), (-3,)], strict=True)):
        found = read[number]
        assert [one.tokens_n.tolist() for one in found.texts] == [
            one.tokens_n.tolist() for one in group.texts
        ]
        assert [one.learned_n.tolist() for one in found.texts] == [
            one.learned_n.tolist() for one in group.texts
        ]
        assert found.margin == group.margin
        assert found.target == group.target or np.isnan(found.target) == np.isnan(group.target)
        assert (found.head, found.references) == (1, references)
