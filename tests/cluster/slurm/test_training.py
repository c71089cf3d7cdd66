"""A recipe on a real SLURM cluster: the same curve, whatever ends a job in the middle."""

import shutil
from pathlib import Path

import pytest

from tests.cluster.runs import (
    ON_ONE,
    SMALL,
    STEPS,
    TWO_NODES,
    UP_TO_TRAINING,
    Curve,
    copied,
    curve,
    history,
    mishaps,
    rank_process,
    steps,
    until,
)
from tests.cluster.slurm.cluster import Cluster
from tests.cluster.slurm.runs import BY_SRUN, BY_TORCHRUN, completed, sbatch, status
from tests.conftest import QUICKSTART
from tests.ranks import run_recipe

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.mark.parametrize("launcher", [BY_SRUN, BY_TORCHRUN], ids=["srun", "torchrun"])
def test_a_job_over_two_nodes_trains_as_local_ranks_do(
    slurm: Cluster, run: Path, local_curve: Curve, launcher: str
) -> None:
    job = sbatch(slurm, run, *TWO_NODES, *SMALL, launcher, *UP_TO_TRAINING)
    completed(slurm, job, run)
    assert curve(run) == local_curve
    assert len(local_curve) == STEPS
    nodes = [e["nodes"] for e in history(run) if e["event"] == "start" and e["task"] == "train"]
    assert [len(set(names)) for names in nodes] == [2]


def test_a_killed_rank_is_started_again_with_the_same_curve_and_status_tells(
    slurm: Cluster, run: Path, local_curve: Curve
) -> None:
    job = sbatch(slurm, run, *TWO_NODES, *SMALL, BY_SRUN, *UP_TO_TRAINING)
    until(lambda: steps(run) > 10)
    rank_process(run, 1).kill()
    completed(slurm, job, run)
    assert curve(run) == local_curve
    events = status(slurm, run)["events"]
    assert "pretrain (train): rank 1 failed: killed by SIGKILL" in events[0]["outcome"]
    assert slurm.job(job)["Restarts"] == "0"


def test_a_job_requeued_by_hand_goes_on_with_the_same_curve_by_the_recipe_it_began_with(
    slurm: Cluster, run: Path, local_curve: Curve, tmp_path: Path
) -> None:
    recipe = Path(shutil.copy(QUICKSTART, tmp_path / "recipe.yaml"))
    few = f"{QUICKSTART.parent}/texts/shakespeare/m[ae]*.txt"
    texts = f"stages.corpus.sources=[{{path: '{few}'}}]"
    job = sbatch(slurm, run, *TWO_NODES, *SMALL, texts, BY_SRUN, *UP_TO_TRAINING, recipe=recipe)
    until(lambda: steps(run) > 10)
    recipe.write_text("nothing: of use")
    slurm.command("scontrol", "requeue", job)
    completed(slurm, job, run)
    assert curve(run) == local_curve
    assert slurm.job(job)["Restarts"] == "1"
    assert "asked to stop: stopped after step" in status(slurm, run)["events"][0]["outcome"]
    assert (run / "code" / "llmscale" / "pipeline.py").is_file()


def test_a_node_without_power_is_replaced_with_the_same_curve_and_named_in_status(
    slurm: Cluster, run: Path, local_curve: Curve
) -> None:
    job = sbatch(slurm, run, *TWO_NODES, *SMALL, BY_SRUN, *UP_TO_TRAINING)
    until(lambda: steps(run) > 10)
    lost = [e["nodes"] for e in history(run) if e["event"] == "start"][-1][1]
    slurm.power_cut(lost)
    slurm.mark_down(lost)
    completed(slurm, job, run)
    assert curve(run) == local_curve
    assert slurm.job(job)["Restarts"] == "1"
    event = status(slurm, run)["events"][0]
    assert lost in event["outcome"]
    assert event["blamed"] == [lost]


def test_the_node_of_the_batch_script_may_lose_power_too(
    slurm: Cluster, run: Path, local_curve: Curve
) -> None:
    job = sbatch(slurm, run, *TWO_NODES, *SMALL, BY_SRUN, *UP_TO_TRAINING)
    until(lambda: steps(run) > 10)
    lost = slurm.job(job)["BatchHost"]
    slurm.power_cut(lost)
    slurm.mark_down(lost)
    completed(slurm, job, run)
    assert curve(run) == local_curve
    event = status(slurm, run)["events"][0]
    assert f"the job ended without a word: {lost} is DOWN" in event["outcome"]


def test_a_node_that_fails_twice_is_left_for_another_and_named_in_status(
    slurm: Cluster, run: Path, local_curve: Curve
) -> None:
    job = sbatch(slurm, run, *TWO_NODES, *SMALL, BY_SRUN, *UP_TO_TRAINING)
    for failures in (1, 2):
        until(lambda failures=failures: steps(run) > 10 * failures)
        rank_process(run, 1).kill()
        until(lambda failures=failures: mishaps(run) == failures)
    bad = next(e for e in history(run) if e["event"] == "end" and e["blamed"])["blamed"][0]
    completed(slurm, job, run)
    assert curve(run) == local_curve
    assert status(slurm, run)["bad_nodes"] == [bad]
    last = [e for e in history(run) if e["event"] == "start"][-1]
    assert bad not in last["nodes"]
    assert slurm.job(job)["ExcNodeList"] == bad


def test_a_time_limit_shorter_than_the_run_is_got_over_twice_with_the_same_curve(
    slurm: Cluster, prepared: Path, tmp_path: Path
) -> None:
    longer = [*SMALL, "stages.pretrain.steps=500"]
    reference = copied(prepared, tmp_path / "reference")
    run_recipe(QUICKSTART, reference, [*longer, *ON_ONE], ["pretrain"])
    run = copied(prepared, tmp_path / "run")
    saving = "stages.pretrain.checkpoint={every: 1, keep: 2}"
    limit = ["--time=00:01:00", "--signal=B:USR1@15"]
    job = sbatch(slurm, run, *TWO_NODES, *longer, saving, BY_SRUN, *UP_TO_TRAINING, options=limit)
    until(lambda: int(slurm.job(job)["Restarts"]) >= 2)
    # On a slow machine a minute is mostly start-up: the rest would take many more.
    slurm.command("scontrol", "update", f"JobId={job}", "TimeLimit=01:00:00")
    completed(slurm, job, run)
    assert curve(run) == curve(reference)
    assert int(slurm.job(job)["Restarts"]) >= 2
    outcomes = [event["outcome"] for event in status(slurm, run)["events"]]
    assert all("before the time limit" in outcome for outcome in outcomes)
    assert len(outcomes) >= 2


def test_a_preempted_job_saves_gives_way_and_comes_back_with_the_same_curve(
    slurm: Cluster, run: Path, local_curve: Curve
) -> None:
    low = ["--partition=low"]
    job = sbatch(slurm, run, *TWO_NODES, *SMALL, BY_SRUN, *UP_TO_TRAINING, options=low)
    until(lambda: steps(run) > 10)
    urgent = slurm.submit(
        "--partition=main", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true"
    )
    assert slurm.wait_for(urgent, ["COMPLETED"]) == "COMPLETED"
    completed(slurm, job, run)
    assert curve(run) == local_curve
    assert "preemption: stopped after step" in status(slurm, run)["events"][0]["outcome"]


def test_an_error_that_would_come_again_is_not_tried_again(slurm: Cluster, run: Path) -> None:
    shutil.rmtree(run / "pretrain")
    long = "stages.pretrain.model.sequence_length=16000000"
    job = sbatch(slurm, run, *TWO_NODES, *SMALL, long, BY_SRUN, *UP_TO_TRAINING)
    assert slurm.wait_for(job, ["FAILED", "COMPLETED"]) == "FAILED"
    log = Path(f"{run}.log").read_text()
    assert log.count("the training split of corpus has") == 1
    assert "Traceback" not in log


def test_restarts_without_progress_come_to_an_end_that_says_so(slurm: Cluster, run: Path) -> None:
    no_network = (
        "cluster.slurm={cpus_per_rank: 1, restarts: 1, environment: {GLOO_SOCKET_IFNAME: missing0}}"
    )
    job = sbatch(slurm, run, *TWO_NODES, *SMALL, no_network, *UP_TO_TRAINING)
    assert slurm.wait_for(job, ["FAILED", "COMPLETED"]) == "FAILED"
    last = Path(f"{run}.log").read_text().splitlines()[-1]
    assert "pretrain (train): no progress in 2 starts, so it is not started again" in last
    assert "missing0" in last
