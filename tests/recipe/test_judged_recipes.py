"""A wrong stage of reward or preference training is answered with one line."""

from typing import Any

import pytest

from tests.recipe.conftest import RECIPES

DATA = f"{RECIPES}/quickstart.yaml"
GOOD = {
    "start_from": "pretrain",
    "data": f"{{own: {{path: {DATA}}}}}",
    "batch": "{global: 8, micro: 1}",
    "optimizer": "{learning_rate: 1.0e-3}",
    "steps": "10",
}
WRONG: dict[str, tuple[str, dict[str, str], str]] = {
    "a head nobody has": (
        "reward",
        {"data": f"{{own: {{path: {DATA}, head: kind}}}}", "heads": "[good, short]"},
        ".data.own.head: 'kind' is no head; use good or short",
    ),
    "two heads of one name": (
        "reward",
        {"heads": "[good, good]"},
        ".heads: two have one name; name each once",
    ),
    "a range upside down": (
        "reward",
        {"data": f"{{own: {{path: {DATA}, score_range: [4.0, -4.0]}}}}"},
        ".data.own.score_range: 4.0 is not below -4.0; give the least one first",
    ),
    "texts split over context ranks": (
        "reward",
        {"parallel": "{context: 2}"},
        ".parallel.context: judged texts are short, and are not split; remove it, or use tensor "
        "or pipeline",
    ),
    "a reward model with an adapter": (
        "reward",
        {"adapter": "{rank: 4}", "engine": "deepspeed"},
        ".adapter: a reward model's head is new, so that it is trained whole; remove it",
    ),
    "weights of answers without KTO": (
        "dpo",
        {"desirable_weight": "2.0"},
        ".desirable_weight: only loss kto weighs answers; remove it",
    ),
    "a loss nobody knows": (
        "dpo",
        {"loss": "hinge"},
        ".loss: 'hinge' is no choice; use sigmoid, ipo or kto",
    ),
    "a reference nobody knows": (
        "dpo",
        {"reference": "frozen"},
        ".reference: 'frozen' is no choice; use kept or alongside",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_stage_is_answered_with_place_key_cause_and_mend(
    quickstart: str, says: Any, name: str
) -> None:
    kind, changes, line = WRONG[name]
    settings = {"kind": kind, **GOOD, **changes}
    written = ", ".join(f"{key}: {value}" for key, value in settings.items())
    said = says(quickstart, [f"stages.judged={{{written}}}"])
    assert said.endswith(f": stages.judged{line}")
