"""``llmscale run --on slurm`` and its followers, as a user has them in several terminals."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import submitit

from tests.cluster.daemons import PATIENCE
from tests.cluster.runs import SMALL, TWO_NODES, UP_TO_TRAINING, copied, steps, until
from tests.cluster.slurm.cluster import Cluster
from tests.cluster.slurm.runs import BY_SRUN, ENDED, environment, llmscale, sbatch
from tests.conftest import QUICKSTART, ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ON_SLURM = ["--on", "slurm", *TWO_NODES, *SMALL, BY_SRUN]
MEASURED = ["--stages", "corpus,tokenizer,pretrain,evaluation"]
LONG = "stages.pretrain.steps=5000"


def in_terminal(slurm: Cluster, *arguments: object) -> "subprocess.Popen[str]":
    """The command in a terminal of its own, where Ctrl-C is not ignored."""
    return subprocess.Popen(
        [sys.executable, "-m", "llmscale", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(slurm), "PYTHONUNBUFFERED": "1"},
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    return copied(prepared, tmp_path / "run")


def test_a_detached_run_is_looked_at_and_cancelled_from_another_terminal(
    slurm: Cluster, run: Path
) -> None:
    started = llmscale(
        slurm, "run", QUICKSTART, *ON_SLURM, LONG, *MEASURED, "--run-dir", run, "--detach", "--json"
    )
    assert started.returncode == 0, started.stderr
    jobs = json.loads(started.stdout)["jobs"]
    assert len(jobs) == 3, "tokens, training and evaluation; the rest was finished before"
    assert [slurm.job(job)["JobName"] for job in jobs] == [
        "quickstart.pretrain.tokens",
        "quickstart.pretrain.train",
        "quickstart.evaluation.run",
    ]
    follower = in_terminal(slurm, "logs", run, "--follow")
    until(lambda: steps(run) > 3)
    told = json.loads(llmscale(slurm, "status", run, "--json").stdout)
    assert told["running"].startswith(f"job {jobs[1]} (RUNNING on node[")
    training = next(stage for stage in told["stages"] if stage["stage"] == "pretrain")
    assert training["status"] == "running"
    assert training["progress"]["total"] == 5000
    again = llmscale(
        slurm, "run", QUICKSTART, *ON_SLURM, LONG, *MEASURED, "--run-dir", run, "--detach", "--json"
    )
    assert json.loads(again.stdout)["jobs"] == jobs, "the same command comes back to the same jobs"
    other = llmscale(slurm, "run", QUICKSTART, *ON_SLURM, *MEASURED, "--run-dir", run, "--detach")
    assert other.returncode == 2
    assert f"job {jobs[1]}, {jobs[2]} runs another recipe in this folder" in other.stderr
    cancelled = llmscale(slurm, "cancel", run)
    assert f"took job {jobs[2]} from the queue; asked job {jobs[1]} to save" in cancelled.stdout
    slurm.wait_for(jobs[1], ENDED)
    said, _ = follower.communicate(timeout=PATIENCE)
    assert "==> pretrain <==" in said
    assert "train: rank 0 of 2" in said
    assert "stopped after step" in said
    stopped = json.loads(llmscale(slurm, "status", run, "--json").stdout)
    assert stopped["running"] is None
    assert next(s for s in stopped["stages"] if s["stage"] == "pretrain")["status"] == "interrupted"
    assert llmscale(slurm, "cancel", run).stdout == "nothing runs in this folder\n"


def test_ctrl_c_leaves_the_jobs_and_tells_how_to_come_back(slurm: Cluster, run: Path) -> None:
    following = in_terminal(slurm, "run", QUICKSTART, *ON_SLURM, "--run-dir", run, *UP_TO_TRAINING)
    until(lambda: steps(run) > 0)
    following.send_signal(signal.SIGINT)
    _said, error = following.communicate(timeout=PATIENCE)
    assert following.returncode == 130
    assert f"llmscale logs {run} --follow" in error
    assert f"llmscale cancel {run}" in error
    back = llmscale(
        slurm, "run", QUICKSTART, *ON_SLURM, "--run-dir", run, *UP_TO_TRAINING, "--json"
    )
    assert back.returncode == 0, back.stderr
    assert json.loads(back.stdout)["metrics"]["pretrain"]["steps"] == 40
    assert steps(run) == 40


def test_what_was_submitted_is_what_runs(slurm: Cluster, run: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    shutil.copy(QUICKSTART, recipe)
    shutil.copytree(QUICKSTART.parent / "texts", tmp_path / "texts")
    started = llmscale(
        slurm, "run", recipe, *ON_SLURM, "--run-dir", run, "--stages", "corpus", "--detach"
    )
    assert started.returncode == 0, started.stderr
    assert (run / "code" / "llmscale" / "cli.py").is_file()
    recipe.write_text("nothing: of use")
    (job,) = json.loads((run / "slurm" / "jobs.json").read_text())
    assert slurm.wait_for(job["job"], ENDED) == "COMPLETED"
    script = slurm.command("scontrol", "write", "batch_script", job["job"], "-")
    assert f"PYTHONPATH={run / 'code'}\n" in script
    assert "quickstart" in (run / "recipe.yaml").read_text()


HOSTILE = "a b'c\"d$(touch {mark});`touch {mark}`\\ \n#é"


def test_texts_reach_the_ranks_as_text(slurm: Cluster, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    text = HOSTILE.format(mark=mark)
    comment = text.replace("\n", "")
    slurm_settings = {
        "environment": {"HOSTILE": text, "LD_PRELOAD": ""},
        "extra_lines": [f"--comment={comment}"],
    }
    folder = tmp_path / 'it\'s $(touch executed) "here"'
    started = llmscale(
        slurm,
        "run",
        QUICKSTART,
        "--on",
        "slurm",
        *SMALL,
        f"cluster.slurm={json.dumps(slurm_settings)}",
        "--run-dir",
        folder,
        "--stages",
        "corpus",
        "--detach",
    )
    assert started.returncode == 0, started.stderr
    (job,) = json.loads((folder / "slurm" / "jobs.json").read_text())
    assert slurm.wait_for(job["job"], ENDED) == "COMPLETED"
    shown = slurm.command("scontrol", "show", "job", job["job"])
    assert f"Comment={comment}" in shown
    assert not mark.exists()
    assert not (ROOT / "executed").exists()


def test_a_rank_finds_the_environments_text_unchanged(slurm: Cluster, tmp_path: Path) -> None:
    """srun hands the launcher's environment to ranks; here a task of srun prints it."""
    text = HOSTILE.format(mark=tmp_path / "executed")
    script = tmp_path / "print.py"
    script.write_text(
        "import os, subprocess, sys\n"
        "from pathlib import Path\n"
        "from llmscale.clusters.base import Job, Task\n"
        "from llmscale.clusters.slurm.settings import SlurmSettings\n"
        "from llmscale.clusters.slurm.srun import Step\n"
        "from llmscale.parallel.exchange import exchange\n"
        "settings = SlurmSettings(environment={'HOSTILE': sys.argv[1]})\n"
        "step = Step(Job(Path('/'), 's', Task('t')), settings)\n"
        "code = 'import os, sys; sys.stdout.write(ascii(os.environ[\"HOSTILE\"]))'\n"
        "with exchange('127.0.0.1') as known:\n"
        "    command = [*step.command()[:-3], '-c', code]\n"
        "    subprocess.run(command, env=step.environment(known), check=True)\n"
    )
    output = tmp_path / "output"
    batch = f"#!/bin/bash\nexec {shlex.join([sys.executable, str(script), text])}\n"
    submitted = subprocess.run(
        ["sbatch", "--parsable", f"--output={output}"],
        input=batch,
        capture_output=True,
        text=True,
        check=True,
        env=environment(slurm),
        cwd=ROOT,
    )
    assert slurm.wait_for(submitted.stdout.strip(), ENDED) == "COMPLETED", output.read_text()
    assert output.read_text().strip() == f"0: {text!a}"
    assert not (tmp_path / "executed").exists()


def test_a_job_with_too_few_nodes_says_how_many(slurm: Cluster, run: Path) -> None:
    job = sbatch(slurm, run, *TWO_NODES, *SMALL, options=["--nodes=1"])
    assert slurm.wait_for(job, ENDED) == "FAILED"
    said = Path(f"{run}.log").read_text()
    assert said == "cluster.nodes: 2 are needed, and this job has 1; use --nodes=2\n"


def test_a_job_runs_on_all_its_nodes_where_the_call_does_not_say(slurm: Cluster, run: Path) -> None:
    layout = ["cluster.ranks_per_node=1", "stages.pretrain.parallel={tensor: 1}"]
    batch = "stages.pretrain.batch={global: 12, micro: 2}"
    short = "stages.pretrain.steps=20"
    job = sbatch(slurm, run, *layout, *SMALL, batch, short, *UP_TO_TRAINING, options=["--nodes=3"])
    assert slurm.wait_for(job, ENDED) == "COMPLETED", Path(f"{run}.log").read_text()
    assert "pretrain: train on 3 ranks" in Path(f"{run}.log").read_text()


def test_more_nodes_than_there_are_is_told_while_it_waits(slurm: Cluster, run: Path) -> None:
    many = ["cluster.nodes=8", "cluster.ranks_per_node=1", "--stages", "pretrain"]
    following = in_terminal(
        slurm, "run", QUICKSTART, "--on", "slurm", *SMALL, *many, "--run-dir", run
    )
    assert following.stdout is not None
    lines = []
    for line in following.stdout:
        lines.append(line)
        if "more nodes than" in line:
            break
    following.send_signal(signal.SIGINT)
    following.communicate(timeout=PATIENCE)
    assert "waits: it asks for more nodes than the partition has" in lines[-1]


def test_a_container_without_pyxis_is_refused(slurm: Cluster, run: Path) -> None:
    image = "cluster.slurm={container: {image: 'pytorch:25.01'}}"
    told = llmscale(slurm, "run", QUICKSTART, *ON_SLURM, image, "--run-dir", run)
    assert told.returncode == 3
    assert told.stderr.startswith("cluster.slurm.container: srun has no --container-image here")


def test_a_partition_that_is_not_there_is_told_in_slurms_words(slurm: Cluster, run: Path) -> None:
    unknown = "cluster.slurm={partition: missing}"
    told = llmscale(slurm, "run", QUICKSTART, *ON_SLURM, unknown, "--run-dir", run)
    assert told.returncode == 3
    assert "sbatch: error: invalid partition specified: missing" in told.stderr
    assert len(told.stderr.splitlines()) == 1


def test_a_node_without_scontrol_waits_for_slurm_to_requeue(
    slurm: Cluster, run: Path, tmp_path: Path
) -> None:
    clients = tmp_path / "clients"
    clients.mkdir()
    for name in ("srun", "squeue", "sbatch", "scancel"):
        (clients / name).symlink_to(shutil.which(name) or "")
    for name in ("bash", "env"):
        (clients / name).symlink_to(shutil.which(name) or "")
    path = f"{Path(sys.executable).parent}{os.pathsep}{clients}"
    job = sbatch(
        slurm,
        run,
        *TWO_NODES,
        *SMALL,
        LONG,
        BY_SRUN,
        *UP_TO_TRAINING,
        options=[f"--export=ALL,PATH={path}"],
    )
    until(lambda: steps(run) > 3)
    slurm.command("scancel", "--batch", "--signal=USR1", job)
    log = Path(f"{run}.log")
    until(lambda: "cannot requeue" in log.read_text())
    time.sleep(2)
    assert slurm.state(job) == "RUNNING"
    slurm.command("scancel", job)
    slurm.wait_for(job, ENDED)
    assert "after a time limit, submit again to go on" in log.read_text()


def test_a_job_of_submitit_runs_the_recipe_on_its_nodes(
    slurm: Cluster, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    executor = submitit.SlurmExecutor(folder=tmp_path / "submitit")
    executor.update_parameters(nodes=2, exclusive=True, time=10, use_srun=False)
    layout = ["cluster.ranks_per_node=1", "stages.pretrain.parallel={tensor: 2}"]
    command = [sys.executable, "-m", "llmscale", "run", str(QUICKSTART), "--on", "slurm"]
    command += [*layout, *SMALL, BY_SRUN, *UP_TO_TRAINING, "--run-dir", str(run)]
    job = executor.submit(submitit.helpers.CommandFunction(command))
    state = slurm.wait_for(job.job_id, ENDED)
    assert state == "COMPLETED", Path(job.paths.stderr).read_text()
    assert steps(run) == 40
