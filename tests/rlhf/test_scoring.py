"""What answers are worth, and that scores which cannot be used are named, not learned from."""

import time
from pathlib import Path

import pytest

from llmscale.errors import RecipeError
from llmscale.rlhf.metrics import distinct
from llmscale.rlhf.scoring import function_named
from tests.ranks import run_ranks
from tests.rlhf.programs import scored

HERE = "tests.rlhf.test_scoring"


def lengths(prompts: list[str], responses: list[str]) -> list[float]:
    return [len(response) for response in responses]


def ones(prompts: list[str], responses: list[str]) -> list[float]:
    return [1.0 for _ in responses]


def raising(prompts: list[str], responses: list[str]) -> list[float]:
    raise KeyError("no such\nanswer")


def hanging(prompts: list[str], responses: list[str]) -> list[float]:
    time.sleep(60)
    return ones(prompts, responses)


def not_a_number(prompts: list[str], responses: list[str]) -> list[float]:
    return [1.0, float("nan"), 1.0]


def too_few(prompts: list[str], responses: list[str]) -> list[float]:
    return [1.0]


def no_numbers(prompts: list[str], responses: list[str]) -> object:
    return None


def test_scores_are_summed_by_weight_and_bad_ones_are_named_on_every_rank(tmp_path: Path) -> None:
    bad = {
        "raising": "raised KeyError: 'no such\\nanswer'",
        "hanging": "no answer after 0.5 s (timeout_seconds)",
        "not_a_number": "the score of answer 2 is nan",
        "too_few": "1 scores for 3 answers",
        "no_numbers": "returned NoneType, not numbers",
    }
    good, *lines = run_ranks(
        scored,
        2,
        tmp_path,
        answers=["abc", "", "xx"],
        ended=[True, True, False],
        without_end=-1.0,
        functions=[
            {"lengths": f"{HERE}:lengths", "ones": f"{HERE}:ones"},
            *({"mine": f"{HERE}:{name}"} for name in bad),
        ],
    )
    total, parts = good
    assert total == [8, 2, -1], "an answer without an end has another score, but its parts are told"
    assert parts == {"lengths": [3, 0, 2], "ones": [1, 1, 1]}
    assert lines == [
        f"rewards.mine: {cause}; the policy was not updated with it" for cause in bad.values()
    ]


@pytest.mark.parametrize("name", ["no.such.module:f", f"{HERE}:missing", "/no/file.py:f"])
def test_a_function_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(RecipeError, match=name.partition(":")[0]):
        function_named(name)


def test_texts_that_repeat_themselves_are_less_distinct() -> None:
    assert distinct(["a b a b", "c d"], 2) == 3 / 4
    assert distinct(["", "a"], 2) == 0
