"""What tests on SLURM and on Ray share: a run to begin with, and the curve it must have."""

from pathlib import Path

import pytest

from tests.cluster.runs import ON_ONE, SMALL, Curve, copied, curve, with_tokens
from tests.conftest import QUICKSTART
from tests.ranks import run_recipe


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ray's tests come last: its daemons take a fifth of a core for as long as they are there."""
    items.sort(key=lambda item: "cluster" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def local_run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small recipe, trained by this machine's own ranks."""
    run = copied(prepared, tmp_path_factory.mktemp("local") / "run")
    run_recipe(QUICKSTART, run, [*SMALL, *ON_ONE], ["pretrain"])
    return run


@pytest.fixture(scope="session")
def local_curve(local_run: Path) -> Curve:
    """Its curve."""
    return curve(local_run)


@pytest.fixture
def run(prepared: Path, local_run: Path, tmp_path: Path) -> Path:
    """A run folder in which only training is left to do."""
    return with_tokens(prepared, local_run, tmp_path / "run")
