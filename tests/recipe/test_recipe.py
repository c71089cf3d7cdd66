"""What a right recipe gives."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.errors import RecipeError
from llmscale.recipe.recipe import Recipe, json_schema, load_recipe, read_resolved
from llmscale.recipe.yaml_places import read_yaml
from llmscale.stages import KINDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipe")


BASE = """
name: base
seed: 7
stages:
  corpus: {kind: prepare, sources: [{path: a.txt}, {path: b.txt}]}
  tokenizer: {kind: tokenizer, corpus: corpus, vocabulary_size: 300}
"""


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / "b.txt").write_text("two", encoding="utf-8")
    return tmp_path


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def test_own_keys_win_over_included_ones_and_mappings_merge(texts: Path) -> None:
    write(texts / "base.yaml", BASE)
    own = "include: base.yaml\nname: own\nstages: {tokenizer: {vocabulary_size: 400}}\n"
    recipe = load_recipe(write(texts / "own.yaml", own))
    assert (recipe.name, recipe.seed, list(recipe.stages)) == ("own", 7, ["corpus", "tokenizer"])
    assert recipe.stages["tokenizer"].model_dump()["vocabulary_size"] == 400


def test_a_later_include_wins_and_lists_are_replaced_whole(texts: Path) -> None:
    write(texts / "base.yaml", BASE)
    write(texts / "more.yaml", "seed: 8\nstages: {corpus: {sources: [{path: b.txt}]}}\n")
    recipe = load_recipe(write(texts / "own.yaml", "include: [base.yaml, more.yaml]\n"))
    assert recipe.seed == 8
    assert len(recipe.stages["corpus"].sources()) == 1


def test_an_include_is_relative_to_the_file_it_stands_in(texts: Path) -> None:
    write(texts / "parts" / "deep" / "base.yaml", BASE)
    write(texts / "parts" / "middle.yaml", "include: deep/base.yaml\nseed: 9\n")
    recipe = load_recipe(write(texts / "own.yaml", "include: parts/middle.yaml\n"))
    assert (recipe.name, recipe.seed) == ("base", 9)


def test_the_same_file_may_be_included_on_two_ways(texts: Path) -> None:
    write(texts / "base.yaml", BASE)
    write(texts / "left.yaml", "include: base.yaml\n")
    write(texts / "right.yaml", "include: base.yaml\n")
    assert load_recipe(write(texts / "own.yaml", "include: [left.yaml, right.yaml]\n")).seed == 7


def test_an_error_names_the_line_of_the_included_file(texts: Path) -> None:
    write(texts / "base.yaml", BASE.replace("300", "3"))
    own = write(texts / "own.yaml", "include: base.yaml\nname: own\n")
    with pytest.raises(RecipeError, match=r"/base\.yaml:6: stages\.tokenizer\.vocabulary_size: 3 "):
        load_recipe(own)


def test_an_error_in_a_replaced_part_names_the_file_that_replaced_it(texts: Path) -> None:
    write(texts / "base.yaml", BASE)
    own = "include: base.yaml\nname: own\nstages:\n  corpus:\n    sources: [{}]\n"
    with pytest.raises(RecipeError, match=r"/own\.yaml:5: stages\.corpus\.sources\.0\.path: is mi"):
        load_recipe(write(texts / "own.yaml", own))


def test_files_that_include_each_other_are_refused_with_the_line(texts: Path) -> None:
    write(texts / "base.yaml", BASE + "include: own.yaml\n")
    own = write(texts / "own.yaml", "name: own\ninclude: base.yaml\n")
    with pytest.raises(RecipeError, match=r"/base\.yaml:7: include: .*own\.yaml includes this"):
        load_recipe(own)


def test_overrides_reach_every_depth_and_list_indexes(texts: Path) -> None:
    file = write(texts / "own.yaml", BASE)
    overrides = (
        "name=other",
        "cluster.ranks_per_node=4",
        "stages.corpus.sources.1.path=a.txt",
        "stages.tokenizer={kind: tokenizer, corpus: corpus, vocabulary_size: 500}",
        "stages.tokenizer.algorithm=unigram",
        "stages.second.kind=tokenizer",
        "stages.second.corpus=corpus",
        "stages.second.vocabulary_size=600",
    )
    recipe = load_recipe(file, overrides)
    plain = recipe.model_dump(mode="json", by_alias=True)
    assert (recipe.name, recipe.cluster.ranks) == ("other", 4)
    assert [Path(source["path"]).name for source in plain["stages"]["corpus"]["sources"]] == [
        "a.txt",
        "a.txt",
    ]
    assert plain["stages"]["tokenizer"]["vocabulary_size"] == 500
    assert plain["stages"]["tokenizer"]["algorithm"] == "unigram"
    assert plain["stages"]["second"]["vocabulary_size"] == 600


def test_the_last_of_two_overrides_of_a_key_wins(texts: Path) -> None:
    assert load_recipe(write(texts / "own.yaml", BASE), ("seed=1", "seed=2")).seed == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("no", "no"),
        ("Yes", "Yes"),
        ("1e-3", 0.001),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("+.inf", float("inf")),
        ("017", 17),
        ("0o17", 15),
        ("0xff", 255),
        ("-3", -3),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("~", None),
        ("", None),
        ("true", True),
        ("FALSE", False),
        ('"5"', "5"),
        ("!!str 5", "5"),
        ("!!float 5", 5.0),
    ],
)
def test_scalars_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    found = read_yaml(write(tmp_path / "x.yaml", f"key: {text}\n")).values["key"]
    assert (type(found), found) == (type(value), value)


def test_aliases_repeat_a_value(texts: Path) -> None:
    text = BASE.replace("seed: 7", "seed: &seed 300").replace(": 300}", ": *seed}")
    recipe = load_recipe(write(texts / "own.yaml", text))
    assert recipe.stages["tokenizer"].model_dump()["vocabulary_size"] == 300


def test_a_folder_with_a_pattern_in_its_name_holds_texts_like_any_other(texts: Path) -> None:
    folder = texts / "a[1]*"
    write(folder / "a.txt", "one")
    write(folder / "b.txt", "two")
    assert len(load_recipe(write(folder / "x.yaml", BASE)).stages["corpus"].sources()) == 2


def test_a_pattern_takes_files_and_leaves_folders_out(texts: Path) -> None:
    write(texts / "sub" / "c.txt", "three")
    text = BASE.replace("{path: a.txt}, {path: b.txt}", "{path: '*'}")
    sources = load_recipe(write(texts / "x.yaml", text)).stages["corpus"].sources()
    assert [Path(name).name for name, *_ in sources] == ["a.txt", "b.txt", "x.yaml"]


def test_show_is_stable(quickstart: str, tmp_path: Path) -> None:
    shown = load_recipe(write(tmp_path / "x.yaml", quickstart)).to_yaml()
    elsewhere = write(tmp_path / "run" / "recipe.yaml", shown)
    assert load_recipe(elsewhere).to_yaml() == shown
    assert read_resolved(elsewhere).to_yaml() == shown


texts_of_any_kind = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.sampled_from(["1e-3", "0o17", "on", "~", "null", "0x1", ".inf", "- a", "a: b", "#", "<<"]),
    st.sampled_from(["\x85", "a\u2028b", "\r\n", "\ufeff", " \n x ", "\x00", "\U0001f600\n"]),
)
numbers = st.floats(min_value=1e-300, max_value=1e300)
fractions = st.floats(min_value=0, max_value=1, exclude_max=True)


@settings(deadline=None, max_examples=150)
@given(
    prompts=st.lists(texts_of_any_kind, min_size=1, max_size=4),
    text_key=texts_of_any_kind,
    learning_rate=numbers,
    beta1=fractions,
    temperature=numbers,
    seed=st.integers(0, 2**32 - 1),
    layers_per_stage=st.sampled_from([None, [1, 3], [2, 2]]),
    tied=st.sampled_from([None, True, False]),
)
def test_a_recipe_written_is_the_recipe_read(folder: Path, quickstart: str, **drawn: Any) -> None:
    plain = read_yaml(write(folder / "x.yaml", quickstart)).values
    stages = plain["stages"]
    stages["evaluation"]["samples"] |= {
        "prompts": drawn["prompts"],
        "temperature": drawn["temperature"],
    }
    stages["corpus"]["sources"][0]["text_key"] = drawn["text_key"]
    stages["pretrain"]["optimizer"] |= {
        "learning_rate": drawn["learning_rate"],
        "beta1": drawn["beta1"],
    }
    stages["pretrain"]["parallel"]["layers_per_stage"] = drawn["layers_per_stage"]
    stages["pretrain"]["model"]["tied_embeddings"] = drawn["tied"]
    recipe = load_recipe(write(folder / "y.yaml", json.dumps(plain | {"seed": drawn["seed"]})))
    assert read_resolved(write(folder / "recipe.yaml", recipe.to_yaml())) == recipe
    assert recipe.seed == drawn["seed"]


def test_stages_run_after_those_they_need_and_else_as_written(
    quickstart: str, tmp_path: Path
) -> None:
    other = "  other: {kind: evaluate, model: pretrain, perplexity: {split: train}}\n"
    plain = read_yaml(write(tmp_path / "x.yaml", quickstart + other)).values
    plain["stages"] = dict(reversed(plain["stages"].items()))
    recipe = load_recipe(write(tmp_path / "y.yaml", json.dumps(plain)))
    assert list(recipe.stages)[:3] == ["other", "evaluation", "pretrain"]
    assert recipe.order() == ["corpus", "tokenizer", "pretrain", "other", "evaluation"]


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        if "properties" in schema and schema.get("type") == "object":
            yield schema
        for inner in schema.values():
            yield from objects(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from objects(inner)


def test_the_json_schema_names_every_kind_and_no_key_beyond_the_known_ones() -> None:
    schema = json.loads(json.dumps(json_schema()))
    described = list(objects(schema))
    kinds = {
        found["properties"]["kind"]["const"] for found in described if "kind" in found["properties"]
    }
    assert kinds == set(KINDS)
    assert all(found["additionalProperties"] is False for found in described)
    assert {"name", "seed", "cluster", "stages", "sweep", "include"} == set(schema["properties"])
    assert {"name", "stages"} <= set(schema["required"])


def test_a_recipe_cannot_be_changed(quickstart: str, tmp_path: Path) -> None:
    recipe: Recipe = load_recipe(write(tmp_path / "x.yaml", quickstart))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 5


def test_reading_a_recipe_imports_no_torch(quickstart: str, tmp_path: Path) -> None:
    file = write(tmp_path / "x.yaml", quickstart)
    code = (
        "import sys; from pathlib import Path; from llmscale.recipe.recipe import load_recipe;"
        f"load_recipe(Path({str(file)!r}));"
        "print([m for m in ('torch', 'numpy', 'transformers', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
