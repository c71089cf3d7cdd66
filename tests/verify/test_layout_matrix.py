"""Every parallel form, all pairs of them and several triples equal one rank, in each family."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from llmscale.verify.proof import Proof
from llmscale.verify.verdict import Check
from tests.verify.cases import proof, run_proofs

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "key_value_heads": 2},
    "bert": {"family": "bert"},
    "t5": {"family": "t5", "layers": 2, "sequence_length": 64},
}
"""A decoder, an encoder, and both: in all forms, and all pairs of forms."""

RELATED: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "qwen3": {"family": "qwen3", "key_value_heads": 2, "head_size": 12},
    "mixtral": {"family": "mixtral", "experts": 4, "key_value_heads": 2},
}
"""Decoders with parts of their own: in all forms."""

FORMS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel": {"tensor": 2}},
    "sequence": {"parallel": {"tensor": 2, "sequence": True}},
    "pipeline": {"parallel": {"pipeline": 2}},
    "interleaved": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
    "uneven": {"parallel": {"pipeline": 2, "layers_per_stage": [1, 3]}},
    "context": {"parallel": {"context": 2}},
    "data": {"parallel": {"data": 2}},
    "distributed": {"parallel": {"data": 2}, "optimizer": {"distributed": True}},
    "recompute": {"recompute": "full"},
    "selective": {"recompute": "selective"},
}
EXCLUSIVE = [
    {"tensor", "sequence"},
    {"pipeline", "interleaved", "uneven"},
    {"data", "distributed"},
    {"recompute", "selective"},
]
TRIPLES = [
    ("tensor", "pipeline", "data"),
    ("sequence", "interleaved", "distributed"),
    ("sequence", "context", "distributed"),
    ("sequence", "uneven", "context"),
    ("interleaved", "context", "distributed"),
    ("sequence", "interleaved", "distributed", "recompute"),
    ("context", "uneven", "data", "selective"),
]
EXPERT_LAYOUTS = [
    ("data",),
    ("distributed",),
    ("sequence",),
    ("context",),
    ("sequence", "distributed"),
    ("context", "distributed"),
    ("interleaved", "distributed"),
    ("sequence", "uneven", "data"),
    ("sequence", "context", "distributed", "recompute"),
]
"""Where experts are dealt out to two ranks besides."""
APART_LAYOUTS = [
    ("tensor",),
    ("context",),
    ("sequence", "context", "data"),
    ("interleaved", "distributed"),
    ("pipeline", "context", "recompute"),
]
"""Where documents packed into a sample are kept apart, so that ranks have unequal tokens."""


def merged(forms: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """The settings of several forms together."""
    settings: dict[str, Any] = {"parallel": dict(more), "optimizer": {}}
    for form in forms:
        for key, value in FORMS[form].items():
            settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
    interleaved_or_not = 4 if settings["parallel"].get("pipeline") else 2
    return {**settings, "micro_batches": interleaved_or_not}


def compatible(forms: tuple[str, ...]) -> bool:
    return not any(len(exclusive & set(forms)) > 1 for exclusive in EXCLUSIVE)


def every_case() -> dict[str, Proof]:
    singles = [(form,) for form in FORMS]
    pairs = [pair for pair in combinations(FORMS, 2) if compatible(pair)]
    wanted = [(name, forms) for name in MODELS for forms in [*singles, *pairs, *TRIPLES]]
    wanted += [(name, forms) for name in RELATED for forms in singles]
    models = MODELS | RELATED
    cases = {
        f"{name}: {' x '.join(forms)}": proof(models[name], **merged(forms))
        for name, forms in wanted
        if name != "mixtral" or "tensor" not in forms
    }
    for forms in EXPERT_LAYOUTS:
        name = f"mixtral: {' x '.join(forms)} x expert"
        cases[name] = proof(models["mixtral"], **merged(forms, expert=2))
    for family in ("llama", "bert"):
        for forms in APART_LAYOUTS:
            name = f"{family}: {' x '.join(forms)} x separate documents"
            cases[name] = proof(models[family], **merged(forms), separate_documents=True)
    return cases


CASES = every_case()


def shown(name: str) -> set[tuple[str, ...]]:
    """What a case shows: its pairs of forms, and each of its forms in its family."""
    family, _, forms = name.partition(": ")
    kind = family if family in MODELS else "related"
    single = {(kind, form) for form in forms.split(" x ")}
    return {(family,), *single, *combinations(forms.split(" x "), 2)}


def few_cases() -> list[str]:
    """Few cases that together show what all do: the ones that show most for their ranks first."""
    chosen, left = [], set().union(*map(shown, CASES))
    while left:
        best = max(CASES, key=lambda name: len(shown(name) & left) / (4 + CASES[name].ranks))
        chosen.append(best)
        left -= shown(best)
    return chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        every = metafunc.config.getoption("--all-layouts")
        metafunc.parametrize("name", list(CASES) if every else few_cases())


@pytest.fixture(scope="module")
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Check]]:
    """The checks of all cases that are to run, whose worlds are started once."""
    here = [item for item in request.session.items if item.path == Path(__file__)]
    names = [item.callspec.params["name"] for item in here if hasattr(item, "callspec")]
    return run_proofs({name: CASES[name] for name in names}, tmp_path_factory.mktemp("matrix"))


def test_the_matrix_has_forty_layouts_in_three_families_and_more() -> None:
    for family in MODELS:
        assert sum(name.startswith(f"{family}:") for name in CASES) >= 40
    assert max(one.ranks for one in CASES.values()) == 8


def test_the_few_that_are_proven_by_default_have_every_pair_of_forms() -> None:
    few = few_cases()
    assert len(few) < 40
    for name in MODELS:
        own = [one.removeprefix(f"{name}: ") for one in few if one.startswith(f"{name}: ")]
        assert {form for one in own for form in one.split(" x ")} >= FORMS.keys()
    for pair in combinations(FORMS, 2):
        if compatible(pair):
            assert any(set(pair) <= set(one.partition(": ")[2].split(" x ")) for one in few), pair


@pytest.mark.ranks
@pytest.mark.slow
def test_a_layout_equals_one_rank(name: str, found: dict[str, list[Check]]) -> None:
    assert [check for check in found[name] if not check.agrees] == []
