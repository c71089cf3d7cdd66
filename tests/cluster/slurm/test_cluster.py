"""The test cluster keeps what it promises to the tests that build on it."""

import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.slurm.cluster import Cluster, wait_until

pytestmark = pytest.mark.slurm


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process that runs with a cluster's configuration."""
    setting = str(folder / "slurm.conf")
    return [
        process
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get("SLURM_CONF") == setting
    ]


def hosts_of(output: Path) -> list[str]:
    return sorted(output.read_text().split())


def test_a_second_cluster_is_up_within_a_minute_and_leaves_no_process(
    slurm: Cluster, tmp_path: Path
) -> None:
    second = Cluster(tmp_path, nodes=2)
    start = time.monotonic()
    second.up()
    seconds = time.monotonic() - start
    try:
        job = second.submit("--nodes=2", "--output=/dev/null", "--wrap=srun sleep 60")
        second.wait_for(job, {"RUNNING"})
        assert wait_until(lambda: "sleep" in {p.name() for p in processes_of(tmp_path)})
    finally:
        second.down()
    assert seconds < 60
    assert processes_of(tmp_path) == []
    assert processes_of(slurm.folder)


def test_a_cluster_that_does_not_come_up_says_why_and_leaves_no_process(
    slurm: Cluster, tmp_path: Path
) -> None:
    ports = slurm.command("scontrol", "show", "config").splitlines()
    taken = next(int(line.split("=")[1]) for line in ports if line.startswith("SlurmctldPort"))
    with pytest.raises(RuntimeError, match=r"slurmctld is not up: .*Address already in use"):
        Cluster(tmp_path, nodes=1, port=taken).up()
    assert processes_of(tmp_path) == []


def test_up_refuses_a_folder_whose_cluster_is_up_and_leaves_it_alone(slurm: Cluster) -> None:
    with pytest.raises(RuntimeError, match="a cluster is up in"):
        Cluster(slurm.folder).up()
    slurm.wait_until_idle(1)


def test_a_job_over_two_nodes_sees_two_hostnames(slurm: Cluster, tmp_path: Path) -> None:
    output = tmp_path / "hosts"
    job = slurm.submit("--nodes=2", f"--output={output}", "--wrap=srun hostname")
    slurm.wait_for(job, {"COMPLETED"})
    assert hosts_of(output) == ["node1", "node2"]


def test_a_killed_nodes_job_runs_again_on_other_nodes(slurm: Cluster, tmp_path: Path) -> None:
    first, again = tmp_path / "started-", tmp_path / "started-1"
    program = f"hostname >> {first}$SLURM_RESTART_COUNT; test $SLURM_RESTART_COUNT || exec sleep 60"
    wrap = f"--wrap=srun sh -c '{program}'"
    job = slurm.submit("--requeue", "--nodes=2", "--output=/dev/null", wrap)
    assert wait_until(lambda: first.exists() and len(hosts_of(first)) == 2)
    lost = hosts_of(first)[0]

    slurm.power_cut(lost)
    slurm.mark_down(lost)
    slurm.wait_for(job, {"PENDING"})
    slurm.wait_for(job, {"COMPLETED"})

    assert hosts_of(again) == [node for node in slurm.nodes if node != lost]


def test_a_started_node_works_again(slurm: Cluster, tmp_path: Path) -> None:
    slurm.power_cut("node3")
    slurm.mark_down("node3")
    assert "node3 down" in slurm.command("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T")

    slurm.start_node("node3")
    slurm.wait_until_idle()

    output = tmp_path / "host"
    job = slurm.submit("--nodelist=node3", f"--output={output}", "--wrap=srun hostname")
    slurm.wait_for(job, {"COMPLETED"})
    assert hosts_of(output) == ["node3"]
