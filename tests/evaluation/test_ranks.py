"""Ranks that share texts and prompts measure what one rank does."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmscale.artifacts import StageFolder
from llmscale.errors import RecipeError
from llmscale.recipe.recipe import load_recipe
from tests.evaluation.test_evaluate_command import RECORDS, REFERENCES
from tests.models_on_disk import small_llama
from tests.ranks import run_recipe

RECIPE = """
name: measured
cluster: {on: local, ranks_per_node: 3, device: cpu}
stages:
  evaluation:
    kind: evaluate
    model: model
    perplexity: {text: texts.jsonl, window: 8}
    classification:
      likely: {path: labelled.jsonl, template: "{text} the", perturbations: [typos], group: who}
      voted: {path: labelled.jsonl, answer: self_consistency, votes: 3, max_new_tokens: 4}
    generation:
      written: {path: references.jsonl, max_new_tokens: 6}
    samples: {prompts: ["what is up?"], max_new_tokens: 4}
"""
FILES = ("classification-likely", "classification-voted", "generation-written")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    small_llama(tmp_path / "model")
    texts = [{"text": one["text"]} for one in RECORDS]
    for name, records in (("labelled", RECORDS), ("references", REFERENCES), ("texts", texts)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(one) + "\n" for one in records))
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return file


def near(value: Any) -> Any:
    """The same, but for the last digits of numbers."""
    if isinstance(value, dict):
        return {key: near(one) for key, one in value.items()}
    if isinstance(value, list):
        return [near(one) for one in value]
    return pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value


def told(stage: StageFolder, name: str) -> list[Any]:
    return [json.loads(line) for line in (stage.path / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_measure_what_one_does(recipe: Path, tmp_path: Path, ranks: int) -> None:
    alone = run_recipe(recipe, tmp_path / "alone", []).stage("evaluation")
    several = [f"stages.evaluation.ranks={ranks}"]
    shared = run_recipe(recipe, tmp_path / "shared", several).stage("evaluation")
    assert shared.manifest()["metrics"] == near(alone.manifest()["metrics"])
    for name in FILES:
        assert told(shared, name) == near(told(alone, name)), name
    assert (shared.path / "samples.json").read_text() == (alone.path / "samples.json").read_text()


def test_more_ranks_than_a_node_has_are_refused(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="4 are more than a node has"):
        load_recipe(recipe, ["stages.evaluation.ranks=4"])
