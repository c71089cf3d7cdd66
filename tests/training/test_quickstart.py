"""The quickstart, with fewer steps: real text to a trained, exported and evaluated model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmscale.artifacts import RunFolder
from tests.conftest import QUICKSTART
from tests.ranks import run_ranks
from tests.training import programs

FEWER_STEPS = ["stages.pretrain.steps=60", "stages.pretrain.checkpoint.every=30"]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    command = [sys.executable, "-m", "llmscale", "run", str(QUICKSTART), *FEWER_STEPS]
    command += ["--run-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return RunFolder(folder)


@pytest.mark.ranks
@pytest.mark.slow
def test_the_model_learns_more_than_which_tokens_are_frequent(quickstart: RunFolder) -> None:
    first = quickstart.stage("pretrain").metrics()[0]["loss"]
    metrics = quickstart.stage("evaluation").manifest()["metrics"]
    trained = quickstart.stage("pretrain").manifest()["metrics"]
    assert trained["validation_loss"] < 0.75 * first
    assert metrics["loss"] < 0.75 * first
    assert metrics["loss"] < metrics["unigram_entropy"]


@pytest.mark.ranks
@pytest.mark.slow
def test_the_exported_model_gives_the_megatron_models_logits(
    quickstart: RunFolder, tmp_path: Path
) -> None:
    folder = quickstart.stage("pretrain").hf
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate."
    tokens = torch.tensor([tokenizer(text)["input_ids"]])
    file = tmp_path / "logits.safetensors"
    run_ranks(
        programs.logits_of_stage,
        1,
        tmp_path / "ranks",
        run=str(quickstart.path),
        tokens=tokens.tolist(),
        file=str(file),
    )
    with torch.no_grad():
        expected = model(tokens).logits
    torch.testing.assert_close(load_file(file)["logits"], expected, atol=1e-4, rtol=0)


@pytest.mark.ranks
@pytest.mark.slow
def test_samples_and_report_are_there(quickstart: RunFolder) -> None:
    samples = json.loads((quickstart.stage("evaluation").path / "samples.json").read_text())
    assert all(sample["text"].strip() for sample in samples)
    page = quickstart.report_file.read_text()
    assert "HAMLET." in page
    assert "<svg" in page


@pytest.mark.ranks
@pytest.mark.slow
def test_a_quarter_of_the_layers_bits_leaves_the_model_nearly_as_good(
    quickstart: RunFolder,
) -> None:
    quantized = quickstart.stage("quantized").manifest()["metrics"]
    assert 8 <= quantized["bits_per_weight"] < 8.3
    rows = json.loads((quickstart.stage("schemes").path / "comparison.json").read_text())
    original, *schemes = rows
    assert original["scheme"] == "original"
    assert all(row["perplexity"] < 1.02 * original["perplexity"] for row in schemes)
    assert all(row["megabytes"] < original["megabytes"] for row in schemes)
    assert "Size and perplexity" in quickstart.report_file.read_text()
