"""The Ray cluster which the tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.cluster.ray.cluster import Cluster, running_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Ray cluster of a head and two workers, all there when a test begins."""
    with running_cluster(tmp_path_factory.mktemp("ray")) as running:
        yield running


@pytest.fixture(autouse=True)
def settled(cluster: Cluster) -> Iterator[None]:
    """Leaves neither jobs nor dead nodes to the next test."""
    yield
    cluster.settle()
