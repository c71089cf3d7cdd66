"""Whatever a user writes gives a recipe or one line: nothing else ever escapes."""

import datetime
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.errors import RecipeError
from llmscale.recipe.recipe import load_recipe, read_resolved
from llmscale.recipe.yaml_places import read_yaml

WORDS = [
    *("kind", "include", "<<", "stages", "corpus", "model", "tokenizer", "pretrain", "evaluation"),
    *("prepare", "text", "0", ".", "..", "~", "~x", "", "a\nb", "\u2028", "\0", "[", "x" * 300),
]
words = st.sampled_from(WORDS) | st.text(max_size=4)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**63, 2**64, 10**30, 10**400, -(10**400)]),
    st.floats(),
    words,
    st.binary(max_size=3),
    st.just(datetime.date(2026, 1, 1)),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | scalars, inner, max_size=3),
    max_leaves=6,
)
signs = st.sampled_from([*"&*!|>%@`{}[],?:-#'\"\\\t\n <~0", "<<: ", "*a", "&a ", "---\n", "!!int "])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


def loads_or_says(folder: Path, content: str, overrides: Iterable[str] = ()) -> None:
    file = folder / "x.yaml"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    try:
        recipe = load_recipe(file, overrides)
    except RecipeError as error:
        assert len(str(error).splitlines()) == 1
        assert str(error).startswith((str(file), "override "))
        assert "Input should" not in str(error)
        return
    written = folder / "recipe.yaml"
    written.write_text(recipe.to_yaml(), encoding="utf-8")
    assert read_resolved(written) == recipe


def mutated(data: st.DataObject, tree: Any) -> Any:
    """The tree with one value somewhere in it replaced, added or removed."""
    parent, key = None, None
    here = tree
    while isinstance(here, dict | list) and here and data.draw(st.integers(0, 5)):
        parent = here
        key = data.draw(st.sampled_from(sorted(here) if isinstance(here, dict) else [0]))
        here = here[key]
    match data.draw(st.sampled_from(["replace", "add", "remove"])):
        case "remove" if parent is not None:
            del parent[key]
        case "add" if isinstance(here, dict):
            here[data.draw(words | scalars)] = data.draw(values)
        case _ if parent is not None:
            parent[key] = data.draw(values)
        case _:
            return data.draw(values)
    return tree


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_value_in_any_place_gives_a_recipe_or_one_line(
    folder: Path, quickstart: str, data: st.DataObject
) -> None:
    file = folder / "quickstart.yaml"
    file.write_text(quickstart, encoding="utf-8")
    tree = mutated(data, read_yaml(file).values)
    loads_or_says(folder, yaml.dump(tree, sort_keys=False))


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_spoilt_text_gives_a_recipe_or_one_line(
    folder: Path, quickstart: str, data: st.DataObject
) -> None:
    text = quickstart
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 20))
        text = text[:at] + data.draw(signs | st.text(max_size=3)) + text[at + cut :]
    loads_or_says(folder, text)


@settings(deadline=None, max_examples=200)
@given(st.lists(words, max_size=5), st.text(max_size=6) | values.map(str))
def test_any_override_gives_a_recipe_or_one_line(
    folder: Path, quickstart: str, path: list[str], value: str
) -> None:
    loads_or_says(folder, quickstart, [f"{'.'.join(path)}={value}"])
