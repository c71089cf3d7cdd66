"""The quickstart recipe as a text to spoil, and a loader that says what a user would read."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from llmscale.errors import RecipeError
from llmscale.recipe.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
JARGON = ("Input should", "Value error", "dictionary", "instance", "None", "tuple", "pydantic")

Says = Callable[..., str]


@pytest.fixture(scope="session")
def quickstart() -> str:
    """The quickstart recipe up to its evaluation, its texts found from any folder."""
    whole = (RECIPES / "quickstart.yaml").read_text(encoding="utf-8")
    text = whole[: whole.index("  quantized:\n")]
    return text.replace("path: texts/", f"path: {RECIPES}/texts/")


@pytest.fixture
def says(tmp_path: Path) -> Says:
    """Loads a wrong recipe and gives its one line, with the recipe's folder left out of it."""

    def load(content: str | bytes, overrides: Iterable[str] = ()) -> str:
        file = tmp_path / "x.yaml"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(RecipeError) as caught:
            load_recipe(file, overrides)
        line = str(caught.value)
        assert len(line.splitlines()) == 1
        assert not [word for word in JARGON if word in line]
        assert sorted(tmp_path.rglob("*")) == before
        line = line.replace(f"{tmp_path}/", "").replace(str(tmp_path), "FOLDER")
        return line.replace(str(RECIPES), "RECIPES")

    return load
