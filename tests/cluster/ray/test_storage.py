"""A run at a URL on nodes that share nothing but that storage."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from llmscale.storage import Storage
from tests.cluster.ray.cluster import Cluster
from tests.cluster.ray.runs import TRAINING, submit, succeeded
from tests.cluster.runs import Curve, until
from tests.storage.runs import curve_at, manifest_at, put_tokens, whole_steps
from tests.storage.server import BUCKET, environment, serving

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def variables() -> Iterator[dict[str, str]]:
    """The environment of a user of a server that is up."""
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(server.port).items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield environment(server.port)


def test_nodes_with_caches_of_their_own_train_as_local_ranks_do_and_get_over_a_lost_one(
    cluster: Cluster,
    variables: dict[str, str],
    local_run: Path,
    local_curve: Curve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLMSCALE_CACHE", str(tmp_path / "cache"))
    url = f"s3://{BUCKET}/ray"
    put_tokens(local_run, url)
    job = submit(cluster, url, *TRAINING, variables=variables)
    until(lambda: bool(whole_steps(url)))
    cluster.power_cut("worker1")
    until(lambda: "starting again" in cluster.jobs().get_job_logs(job))
    cluster.start_worker("worker1")
    said = succeeded(cluster, job)
    assert f"report: {url}/report.html" in said
    assert curve_at(url) == local_curve
    manifest = manifest_at(url)
    assert manifest["status"] == "finished"
    assert manifest["metrics"]["steps"] == len(local_curve)
    assert {"hf", "logs", "metrics.jsonl", "checkpoints"} <= set(manifest["outputs"])
    names = Storage(url).versions("pretrain")
    assert {"pretrain/logs/rank-00000.log", "pretrain/logs/rank-00001.log"} <= set(names)
    assert "pretrain/hf/model.safetensors" in names
    caches = [cluster.folder / worker / "cache" / "runs" for worker in cluster.workers]
    newest = f"*/pretrain/checkpoints/step-{len(local_curve):08d}/__*"
    ranks = [{file.name.split("_")[2] for file in cache.glob(newest)} for cache in caches]
    assert sorted(map(sorted, ranks)) == [["0"], ["1"]]
    assert "secret-of-the-test" not in said
