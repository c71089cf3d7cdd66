"""Training that goes on with fewer ranks while a node is missing."""

from pathlib import Path

import pytest

from tests.cluster.ray.cluster import Cluster
from tests.cluster.ray.runs import submit, succeeded
from tests.cluster.runs import SMALL, copied, curve, mishaps, steps, until
from tests.conftest import QUICKSTART
from tests.ranks import run_recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LONGER = [
    *SMALL,
    "stages.pretrain.steps=200",
    "stages.pretrain.optimizer.learning_rate=3e-4",  # at 3e-3, rounding alone grows to 1e-4
    "stages.pretrain.checkpoint={every: 1, keep: 2}",  # which takes long enough for a node to start
]
ON_ONE_RANK = ["cluster.ranks_per_node=1", "stages.pretrain.parallel={}"]
ELASTIC = [
    *("cluster.nodes=2", "cluster.ranks_per_node=1", "stages.pretrain.parallel={data: 2}"),
    "cluster.ray={cpus_per_rank: 2, elastic: true}",
]


def test_a_missing_node_is_done_without_until_it_is_back_with_the_same_curve(
    cluster: Cluster, prepared: Path, run: Path, tmp_path: Path
) -> None:
    reference = copied(prepared, tmp_path / "reference")
    run_recipe(QUICKSTART, reference, [*LONGER, *ON_ONE_RANK], ["pretrain"])

    job = submit(cluster, run, *LONGER, *ELASTIC, "--stages", "corpus,tokenizer,pretrain")
    said = lambda: str(cluster.jobs().get_job_logs(job))  # noqa: E731
    until(lambda: steps(run) > 50)
    cluster.power_cut("worker1")
    until(lambda: "going on with 1 of 2 ranks" in said())
    until(lambda: steps(run) > 60)
    cluster.start_worker("worker1")
    until(lambda: mishaps(run) == 2)
    succeeded(cluster, job)
    assert said().count("train on 2 ranks") == 1
    assert "there is room for more ranks" in said()
    losses = [loss for _step, loss, _norm in curve(run)]
    assert losses == pytest.approx([loss for _step, loss, _norm in curve(reference)], rel=1e-5)
