"""What several tests share: the quickstart's corpus and tokenizer, made once."""

import os
import shutil
from pathlib import Path

import pytest

from llmscale.parallel.exchange import CORES_VARIABLE
from tests.ranks import run_recipe
from tests.small import FEW_TEXTS

# Threads that spin while they wait for a core cost small models several times their own work.
os.environ |= {CORES_VARIABLE: "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
ASSISTANT = ROOT / "recipes" / "assistant.yaml"
"""Needs a model that is imported first."""
REWARD = ROOT / "recipes" / "reward.yaml"
PRETRAINING = sorted({*(ROOT / "recipes").glob("*.yaml")} - {ASSISTANT, REWARD})
"""The shipped recipes that pretrain a model."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-layouts", action="store_true", help="prove all layouts, not few that show as much"
    )


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose corpus (of few texts) and tokenizer stages are finished."""
    folder = tmp_path_factory.mktemp("prepared") / "run"
    run_recipe(QUICKSTART, folder, [FEW_TEXTS], ["corpus", "tokenizer"])
    return folder


@pytest.fixture
def run_folder(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared run folder, for this test alone."""
    return Path(shutil.copytree(prepared, tmp_path / "run"))
