"""The Ray cluster which the tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.cluster.daemons import running
from tests.cluster.ray.cluster import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Ray cluster of a head and two workers, all there when a test begins."""
    with running(Cluster(tmp_path_factory.mktemp("ray"))) as there:
        yield there


@pytest.fixture(autouse=True)
def settled(cluster: Cluster) -> Iterator[None]:
    """Leaves neither jobs nor dead nodes to the next test."""
    yield
    cluster.settle()
