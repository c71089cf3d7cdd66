"""A server, and for each test a place of its own on it, as the environment's storage."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tests.storage.server import BUCKET, Server, Way, environment, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with serving() as there:
        yield there


@pytest.fixture
def way(server: Server) -> Iterator[Way]:
    """The only way that the test has to the server."""
    there = Way(server.port)
    yield there
    there.close()


@pytest.fixture
def url(
    way: Way, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> str:
    """Where nothing is yet; caches are within the test's folder."""
    for name, value in environment(way.port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LLMSCALE_CACHE", str(tmp_path / "cache"))
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # it knows the way of another test
    return f"s3://{BUCKET}/{tmp_path.name}"
