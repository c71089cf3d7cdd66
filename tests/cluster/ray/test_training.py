"""A recipe on a real Ray cluster: the same curve, whatever is lost in the middle."""

import random
import re
import shutil
from pathlib import Path

import pytest

from tests.cluster.ray.cluster import Cluster
from tests.cluster.ray.runs import (
    TRAINING,
    actor_of,
    command,
    ended,
    status,
    submit,
    succeeded,
)
from tests.cluster.runs import STEPS, Curve, curve, mishaps, rank_process, steps, until

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_ray_job_over_two_nodes_trains_as_local_ranks_do(
    cluster: Cluster, tmp_path: Path, local_curve: Curve
) -> None:
    """With the checkout uploaded, as the README of ray/ has it."""
    run = tmp_path / "run"
    told = command(
        cluster,
        *("ray", "job", "submit", "--address", cluster.address),
        *("--runtime-env", "ray/runtime_env.yaml", "--"),
        *("llmscale", "run", "recipes/quickstart.yaml", *TRAINING, "--run-dir", run),
    )
    assert told.returncode == 0, told.stdout + told.stderr
    assert "succeeded" in told.stdout
    assert curve(run) == local_curve
    assert len(local_curve) == STEPS
    assert len(set(re.findall(r"rank \d on (\S+?)[,;\s]", told.stdout))) == 2


def test_killed_actors_are_started_again_with_the_same_curve_and_status_tells(
    cluster: Cluster, run: Path, local_curve: Curve
) -> None:
    moments = random.Random(0)
    job = submit(cluster, run, *TRAINING)
    for kill in range(2):
        moment = moments.randrange(4, 12) + 16 * kill
        until(lambda: steps(run) > moment)  # noqa: B023
        actor_of(rank_process(run, moments.randrange(2))).kill()
        until(lambda: mishaps(run) > kill)  # noqa: B023
    succeeded(cluster, job)
    assert curve(run) == local_curve
    outcomes = [event["outcome"] for event in status(cluster, run)["events"]]
    assert len(outcomes) == 2
    assert all("failed: killed by SIGKILL" in outcome for outcome in outcomes)


def test_a_worker_without_power_is_waited_for_with_the_same_curve_and_named_in_status(
    cluster: Cluster, run: Path, local_curve: Curve
) -> None:
    job = submit(cluster, run, *TRAINING)
    until(lambda: steps(run) > 10)
    cluster.power_cut("worker1")
    until(lambda: mishaps(run) == 1)
    until(lambda: "waiting up to 600 s for 2 CPU" in cluster.jobs().get_job_logs(job))
    cluster.start_worker("worker1")
    succeeded(cluster, job)
    assert curve(run) == local_curve
    assert "127.0.2.2 failed" in status(cluster, run)["events"][0]["outcome"]


def test_an_error_that_would_come_again_is_not_tried_again(cluster: Cluster, run: Path) -> None:
    shutil.rmtree(run / "pretrain")
    job = submit(cluster, run, *TRAINING, "stages.pretrain.model.sequence_length=16000000")
    assert ended(cluster, job) == "FAILED"
    assert cluster.jobs().get_job_info(job).driver_exit_code == 4
    log = cluster.jobs().get_job_logs(job)
    assert log.count("the training split of corpus has") == 1
    assert "Traceback" not in log
    assert "starting again" not in log
