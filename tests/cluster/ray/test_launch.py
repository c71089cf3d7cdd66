"""Starting, following and ending runs on a Ray cluster, from outside of it."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from llmscale.artifacts import RunFolder
from llmscale.clusters.ray.jobs import job_of
from tests.cluster.daemons import PATIENCE
from tests.cluster.ray.cluster import Cluster
from tests.cluster.ray.runs import (
    TRAINING,
    ended,
    environment,
    llmscale,
    status,
    submit,
)
from tests.cluster.runs import ON_ONE, SMALL, UP_TO_TRAINING, Curve, curve, steps, until
from tests.conftest import QUICKSTART, ROOT
from tests.ranks import processes_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_detached_run_is_looked_at_and_cancelled_from_another_terminal(
    cluster: Cluster, run: Path
) -> None:
    call = ["run", QUICKSTART, *TRAINING, "stages.pretrain.steps=4000", "--on", "ray"]
    call += ["--address", cluster.address, "--run-dir", run, "--detach", "--json"]
    started = llmscale(cluster, *call)
    assert started.returncode == 0, started.stderr
    job = json.loads(started.stdout)["jobs"][0]
    until(lambda: steps(run) > 5)
    told = status(cluster, run)
    assert told["running"] == f"Ray job {job} (RUNNING)"
    assert told["jobs"][0]["job"] == job
    assert [s["status"] for s in told["stages"] if s["stage"] == "pretrain"] == ["running"]
    log = llmscale(cluster, "logs", run, "--rank", 1)
    assert "rank 1 of 2" in log.stdout
    again = llmscale(cluster, *call)
    assert json.loads(again.stdout)["jobs"] == [job]

    follower = subprocess.Popen(
        [sys.executable, "-m", "llmscale", "logs", str(run), "--follow"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(cluster),
        cwd=ROOT,
    )
    assert f"asked Ray job {job} to save and stop" in llmscale(cluster, "cancel", run).stdout
    assert ended(cluster, job) == "STOPPED"
    assert "with a checkpoint" in follower.communicate(timeout=PATIENCE)[0]
    assert processes_of(run) == []
    assert noted_state(run) == "STOPPED"
    told = status(cluster, run)
    assert told["running"] is None
    assert [s["status"] for s in told["stages"] if s["stage"] == "pretrain"] == ["interrupted"]


def noted_state(run: Path) -> str | None:
    """How the run's job ended, as the run folder has it."""
    job = job_of(RunFolder(run))
    return None if job is None else job.state


def test_a_followed_run_says_what_its_job_says_and_ends_as_it_does(
    cluster: Cluster, run: Path, local_curve: Curve
) -> None:
    told = llmscale(
        cluster,
        *("run", QUICKSTART, *TRAINING, "--on", "ray", "--address", cluster.address),
        *("--run-dir", run),
    )
    assert told.returncode == 0, told.stderr
    assert "pretrain: train on 2 ranks" in told.stdout
    assert told.stderr == ""
    assert noted_state(run) == "SUCCEEDED"
    assert curve(run) == local_curve


def test_ctrl_c_leaves_the_job_and_says_how_to_come_back(cluster: Cluster, run: Path) -> None:
    follower = subprocess.Popen(
        [
            *(sys.executable, "-m", "llmscale", "run", str(QUICKSTART), *TRAINING),
            *("stages.pretrain.steps=4000", "--on", "ray", "--address", cluster.address),
            *("--run-dir", str(run)),
        ],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(cluster),
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    until(lambda: steps(run) > 2)
    follower.send_signal(signal.SIGINT)
    said = follower.communicate(timeout=PATIENCE)[1]
    assert follower.returncode == 130
    assert f"llmscale logs {run} --follow" in said
    assert status(cluster, run)["running"].startswith("Ray job quickstart-")


def test_more_than_the_cluster_has_is_refused_after_the_wait(cluster: Cluster, run: Path) -> None:
    job = submit(
        cluster,
        run,
        *TRAINING,
        *("cluster.nodes=8", "stages.pretrain.parallel={tensor: 4, pipeline: 2}"),
        "cluster.ray={wait_seconds: 5}",
    )
    assert ended(cluster, job) == "FAILED"
    assert cluster.jobs().get_job_info(job).driver_exit_code == 3
    last = cluster.jobs().get_job_logs(job).strip().splitlines()[-1]
    assert "asks for 8 CPU for 8 ranks (pack), and the cluster has 3 nodes with 4 CPU" in last
    assert "after 5 s" in last


def test_a_run_folder_that_not_all_nodes_see_is_named(cluster: Cluster) -> None:
    job = submit(cluster, Path("/tmp/ray/run"), *TRAINING)
    assert ended(cluster, job) == "FAILED"
    last = cluster.jobs().get_job_logs(job).strip().splitlines()[-1]
    assert "does not see /tmp/ray/run; keep the run folder (--run-dir, LLMSCALE_RUNS)" in last


def test_without_an_address_a_ray_of_its_own_comes_and_goes(run: Path, local_curve: Curve) -> None:
    call = [*("run", str(QUICKSTART), *SMALL, *ON_ONE, "--on", "ray"), *UP_TO_TRAINING]
    running = subprocess.Popen(
        [sys.executable, "-m", "llmscale", *call, "--run-dir", str(run)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    until(lambda: steps(run) > 2)
    family = psutil.Process(running.pid).children(recursive=True)
    assert {"raylet", "gcs_server"} <= {process.name() for process in family}
    listening = {
        connection.laddr.ip
        for process in family
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert "pretrain: train on 2 ranks" in running.communicate(timeout=PATIENCE)[0]
    assert running.returncode == 0
    assert curve(run) == local_curve
    assert not any(process.is_running() for process in family)
