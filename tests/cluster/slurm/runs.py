"""Small runs of the shipped quickstart on the test cluster, and what they left."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.slurm.cluster import Cluster
from tests.conftest import QUICKSTART, ROOT
from tests.small import SMALL_MODEL

STEPS = 40
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
TWO_NODES = [
    "cluster.nodes=2",
    "cluster.ranks_per_node=1",
    "stages.pretrain.parallel={tensor: 2}",
]
SMALL = [
    *SMALL_MODEL,
    f"stages.pretrain.steps={STEPS}",
    "stages.pretrain.batch={global: 8, micro: 4}",
    "stages.pretrain.checkpoint={every: 8, keep: 2}",
]
BY_SRUN = "cluster.slurm={cpus_per_rank: 1}"
BY_TORCHRUN = "cluster.slurm={cpus_per_rank: 1, launcher: torchrun}"
UP_TO_TRAINING = ["--stages", "corpus,tokenizer,pretrain"]

Curve = list[tuple[int, float, float]]


def curve(run: Path) -> Curve:
    """Step, loss and gradient norm of each step."""
    lines = (run / "pretrain" / "metrics.jsonl").read_text().splitlines()
    return [
        (line["step"], line["loss"], line["gradient_norm"])
        for line in map(json.loads, lines)
        if "loss" in line
    ]


def steps(run: Path) -> int:
    """How many steps are logged so far."""
    file = run / "pretrain" / "metrics.jsonl"
    return len(curve(run)) if file.exists() else 0


def until(true: Callable[[], bool], seconds: float = 120) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def llmscale(slurm: Cluster, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command, as a user of that cluster runs it."""
    return subprocess.run(
        [sys.executable, "-m", "llmscale", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(slurm),
        cwd=ROOT,
        timeout=300,
    )


def status(slurm: Cluster, run: Path) -> dict[str, Any]:
    """What ``llmscale status --json`` tells."""
    told = llmscale(slurm, "status", run, "--json")
    assert told.returncode == 0, told.stderr
    answer: dict[str, Any] = json.loads(told.stdout)
    return answer


def environment(slurm: Cluster) -> dict[str, str]:
    """A user's environment, with the interpreter of these tests first on its path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, **slurm.environment}


def sbatch(
    slurm: Cluster,
    run: Path,
    *arguments: object,
    options: list[str] | None = None,
    recipe: Path = QUICKSTART,
) -> str:
    """Submits the shipped script, on two nodes unless told; returns the job's id."""
    submitted = subprocess.run(
        [
            "sbatch",
            "--parsable",
            f"--output={run}.log",
            *(options or []),
            "slurm/train.sbatch",
            str(recipe),
            *map(str, arguments),
            "--run-dir",
            str(run),
        ],
        capture_output=True,
        text=True,
        env=environment(slurm),
        cwd=ROOT,
    )
    assert submitted.returncode == 0, submitted.stderr
    return submitted.stdout.strip()


def completed(slurm: Cluster, job: str, run: Path, seconds: float = 180) -> None:
    """Waits until a job has ended, and it must have ended well."""
    state = slurm.wait_for(job, ENDED, seconds)
    log = Path(f"{run}.log")
    assert state == "COMPLETED", log.read_text() if log.exists() else state


def copied(prepared: Path, run: Path) -> Path:
    """A run folder whose corpus and tokenizer are finished."""
    return Path(shutil.copytree(prepared, run))


def rank_process(run: Path, rank: int) -> psutil.Process:
    """A training rank's process, wherever on this machine its node is."""
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if "llmscale.rank_process" not in command or str(run) not in command:
            continue
        if not re.search(r'"name": "train"', command) or "torch.distributed" in command:
            continue
        own = process.environ()
        if own.get("RANK", own.get("SLURM_PROCID")) == str(rank):
            return process
    raise AssertionError(f"rank {rank} of {run} does not run")
