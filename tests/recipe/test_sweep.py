"""A recipe's sweep: which members it stands for, and that each is a recipe by itself."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.errors import RecipeError
from llmscale.recipe.recipe import Recipe, load_recipe, read_resolved
from llmscale.recipe.sweep import MOST_MEMBERS, grid
from llmscale.recipe.yaml_places import write_yaml
from tests.recipe.test_any_input import loads_or_says, values, words

RATE = "stages.pretrain.optimizer.learning_rate"
KEYS = [
    "seed",
    RATE,
    "stages.pretrain.steps",
    "stages.pretrain.model",
    "stages.pretrain.model.layers",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    file = folder / "x.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, overrides)


def test_members_are_the_product_in_the_order_written_the_last_key_fastest(
    quickstart: str, folder: Path
) -> None:
    recipe = load(folder, f"{quickstart}sweep:\n  {RATE}: [1e-3, 3e-3]\n  seed: [1, 2]\n")
    assert grid(recipe.sweep or {}) == {
        "000": {RATE: 0.001, "seed": 1},
        "001": {RATE: 0.001, "seed": 2},
        "002": {RATE: 0.003, "seed": 1},
        "003": {RATE: 0.003, "seed": 2},
    }
    for member, (rate, seed) in zip(
        recipe.members(), itertools.product((0.001, 0.003), (1, 2)), strict=True
    ):
        assert member == load(folder, quickstart, f"{RATE}={rate}", f"seed={seed}")


@given(st.dictionaries(st.text(), st.lists(st.integers(), min_size=1, max_size=4), max_size=4))
def test_the_grid_holds_every_combination_once(sweep: dict[str, list[int]]) -> None:
    members = grid({key: tuple(values) for key, values in sweep.items()})
    assert len(members) == math.prod(map(len, sweep.values()))
    assert list(members) == [f"{number:03d}" for number in range(len(members))]
    assert [tuple(m.values()) for m in members.values()] == list(itertools.product(*sweep.values()))


def test_without_a_sweep_there_are_no_members(quickstart: str, folder: Path) -> None:
    assert load(folder, quickstart).members() == []
    assert load(folder, f"{quickstart}sweep: {{seed: [1]}}\n", "sweep=").members() == []


@pytest.mark.parametrize(
    "overrides",
    [
        [f"sweep={{seed: [1, 2], {RATE}: [0.1]}}"],
        ["sweep={seed: [1, 2]}", f"sweep.{RATE}=[0.1]"],
        ["sweep.seed=[1, 2]", f"sweep.{RATE}=[0.1]"],
        [f"sweep={{seed: [5], {RATE}: [0.1]}}", "sweep.seed=[1, 2]"],
    ],
)
def test_overrides_set_a_sweep_whole_or_by_a_key_with_dots(
    quickstart: str, folder: Path, overrides: list[str]
) -> None:
    assert load(folder, quickstart, *overrides).sweep == {"seed": (1, 2), RATE: (0.1,)}


def test_an_override_of_another_key_holds_for_all_members(quickstart: str, folder: Path) -> None:
    recipe = load(folder, f"{quickstart}sweep: {{seed: [1, 2]}}\n", "stages.pretrain.steps=30")
    assert [m.stages["pretrain"].model_dump()["steps"] for m in recipe.members()] == [30, 30]


def test_an_included_sweep_merges_key_by_key(quickstart: str, folder: Path) -> None:
    (folder / "base.yaml").write_text(f"{quickstart}sweep: {{seed: [1], {RATE}: [0.1]}}\n")
    recipe = load(folder, "include: base.yaml\nsweep: {seed: [2, 3]}\n")
    assert recipe.sweep == {"seed": (2, 3), RATE: (0.1,)}


def test_paths_in_a_sweep_start_from_the_recipes_folder(quickstart: str, folder: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("text", encoding="utf-8")
    recipe = load(folder, f"{quickstart}sweep: {{stages.corpus.sources.0.path: [a.txt, b.txt]}}\n")
    paths = [str(folder / "a.txt"), str(folder / "b.txt")]
    assert list((recipe.sweep or {})["stages.corpus.sources.0.path"]) == paths
    assert [str(m.stages["corpus"].sources()[0][0]) for m in recipe.members()] == paths


def test_a_shown_sweep_is_the_sweep_and_reads_from_anywhere(
    quickstart: str, folder: Path, tmp_path: Path
) -> None:
    values = "[{pipeline: 2, tensor: 4}, {pipeline: 2, data: 4, layers_per_stage: null}]"
    recipe = load(folder, f"{quickstart}sweep: {{stages.pretrain.parallel: {values}}}\n")
    shown = recipe.to_yaml()
    assert "sweep:" in shown
    assert load(tmp_path, shown).to_yaml() == shown
    assert read_resolved(tmp_path / "x.yaml") == recipe
    assert load(tmp_path, shown).members() == recipe.members()


def test_an_error_names_the_line_of_the_value_and_what_goes_with_it(
    quickstart: str, folder: Path
) -> None:
    lines = quickstart.count("\n")
    sweep = "sweep:\n  seed: [1]\n  stages.pretrain.model.layers:\n    - 4\n    - 5\n"
    with pytest.raises(RecipeError) as caught:
        load(folder, quickstart + sweep)
    assert str(caught.value) == (
        f"{folder}/x.yaml:{lines + 5}: sweep: with seed=1, stages.pretrain.model.layers=5: "
        "stages.pretrain.parallel.pipeline: 2 pipeline stages do not divide 5 layers; use 1 or 5, "
        "or lay the layers out by layers_per_stage"
    )


def test_a_thousand_members_are_checked_within_seconds_and_more_are_refused(
    quickstart: str, folder: Path
) -> None:
    most = load(folder, quickstart, f"sweep.seed={list(range(MOST_MEMBERS))}")
    assert list(grid(most.sweep or {}))[-1] == "999"
    with pytest.raises(RecipeError, match=r"sweep: has 1001 members; give at most 1000$"):
        load(folder, quickstart, f"sweep.seed={list(range(MOST_MEMBERS + 1))}")
    numbers = list(range(10**4))
    with pytest.raises(RecipeError, match=r"sweep: has 10{12} members"):
        load(folder, quickstart, *(f"sweep.{key}={numbers}" for key in KEYS[:3]))


@settings(deadline=None, max_examples=200)
@given(
    sweep=values
    | st.dictionaries(
        st.sampled_from(KEYS) | words, values | st.lists(values, max_size=3), max_size=3
    )
)
def test_any_sweep_gives_a_recipe_or_one_line(folder: Path, quickstart: str, sweep: Any) -> None:
    try:
        text = write_yaml({"sweep": sweep})
    except Exception:
        return
    loads_or_says(folder, f"{quickstart}{text}")
