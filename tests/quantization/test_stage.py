"""kind: quantize and kind: compare, in a recipe."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmscale.artifacts import RunFolder, checksum
from llmscale.errors import RecipeError
from llmscale.recipe.recipe import load_recipe
from tests.quantization.small import TEXT, recipe_beside_llama, small_llama
from tests.ranks import processes_of, run_recipe

RECIPE = f"""
name: small
cluster: {{on: local, ranks_per_node: 1}}
stages:
  corpus:
    kind: prepare
    sources: [{{path: "{TEXT.parent}/m*.txt"}}]
    validation_fraction: 0.5
  quantized:
    kind: quantize
    model: llama
    corpus: corpus
    scheme: int4-gptq
    calibration: {{split: train, tokens: 1024}}
  evaluation:
    kind: evaluate
    model: quantized
    perplexity: {{text: "{TEXT.parent}/ORIGIN.md"}}
  comparison:
    kind: compare
    model: llama
    corpus: corpus
    schemes: [int8-weight, int4-weight]
    measured_on: {{split: validation}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return recipe_beside_llama(tmp_path, RECIPE)


def test_a_recipe_quantizes_evaluates_and_compares(recipe: Path, tmp_path: Path) -> None:
    run_recipe(recipe, tmp_path / "run", [])

    run = RunFolder(tmp_path / "run")
    metrics = run.stage("quantized").manifest()["metrics"]
    assert (metrics["group_size"], metrics["calibration_tokens"]) == (64, 1024)
    assert "128 does not divide 64 inputs" in run.stage("quantized").log_file(0).read_text()
    assert run.stage("evaluation").manifest()["metrics"]["perplexity"] > 1
    rows = json.loads((run.stage("comparison").path / "comparison.json").read_text())
    assert [row["scheme"] for row in rows] == ["original", "int8-weight", "int4-weight"]
    assert rows[1]["divergence"] < rows[2]["divergence"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.quantized.calibration=null", "stages.quantized.scheme: int4-gptq is calibrated"),
        ("stages.quantized.calibration={tokens: 9}", "give either split or text, not both"),
        ("stages.quantized.calibration={text: no.txt}", "no file matches"),
        ("stages.quantized.scheme=nf5", "nf5"),
        ("stages.quantized.bits=5.5", "stages.quantized.bits: int4-gptq has bits of its own"),
        ("stages.quantized.key_value_cache=int4", "stages.quantized.key_value_cache"),
        ("stages.comparison.schemes=[nf4, nf4]", "one is named twice"),
        ("stages.comparison.schemes=[int4-awq]", "int4-awq is calibrated with texts"),
    ],
)
def test_what_cannot_run_is_found_before_it_starts(recipe: Path, override: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe, [override])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_killed_stage_goes_on_behind_its_finished_blocks(tmp_path: Path) -> None:
    text = f"""
name: small
cluster: {{on: local, ranks_per_node: 1}}
stages:
  quantized:
    kind: quantize
    model: llama
    scheme: int4-awq-gptq
    calibration: {{text: "{TEXT}", tokens: 1024}}
"""
    small_llama(tmp_path / "llama", num_hidden_layers=6)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    whole = run_recipe(recipe, tmp_path / "whole", []).stage("quantized").hf

    call = [sys.executable, "-m", "llmscale", "run", recipe, "--run-dir", tmp_path / "killed"]
    hf = RunFolder(tmp_path / "killed").stage("quantized").hf
    beside = hf.with_name("hf.quantizing")
    process = subprocess.Popen(call, start_new_session=True)
    end = time.monotonic() + 600
    while not (beside / "block-00001.safetensors").exists() and time.monotonic() < end:
        time.sleep(0.01)
    for one in processes_of(tmp_path / "killed"):
        one.kill()
    process.wait()
    assert not hf.exists(), "the kill came too late to prove anything"
    kept = {file.name: file.stat().st_mtime_ns for file in beside.glob("block-*")}
    assert len(kept) >= 2

    subprocess.run(call, check=True, capture_output=True)

    assert {name: (hf / name).stat().st_mtime_ns for name in kept} == kept
    assert {file.name: checksum(file) for file in hf.iterdir()} == {
        file.name: checksum(file) for file in whole.iterdir()
    }
    assert not beside.exists()
