"""The SLURM cluster which the tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.cluster.daemons import running
from tests.cluster.slurm.cluster import Cluster


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A SLURM cluster of three nodes, all idle when a test begins."""
    with running(Cluster(tmp_path_factory.mktemp("slurm"), nodes=3)) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def settled(slurm: Cluster) -> Iterator[None]:
    """Leaves neither jobs nor dead nodes to the next test."""
    yield
    slurm.settle()
