"""Small runs of the shipped quickstart on the test cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.cluster.daemons import PATIENCE
from tests.cluster.slurm.cluster import Cluster
from tests.conftest import QUICKSTART, ROOT

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
BY_SRUN = "cluster.slurm={cpus_per_rank: 1}"
BY_TORCHRUN = "cluster.slurm={cpus_per_rank: 1, launcher: torchrun}"


def llmscale(slurm: Cluster, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command, as a user of that cluster runs it."""
    return subprocess.run(
        [sys.executable, "-m", "llmscale", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(slurm),
        cwd=ROOT,
        timeout=PATIENCE,
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
    script: str = "slurm/train.sbatch",
) -> str:
    """Submits a shipped script, on two nodes unless told; returns the job's id."""
    submitted = subprocess.run(
        [
            "sbatch",
            "--parsable",
            f"--output={run}.log",
            *(options or []),
            script,
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


def completed(slurm: Cluster, job: str, run: Path) -> None:
    """Waits until a job has ended, and it must have ended well."""
    state = slurm.wait_for(job, ENDED)
    log = Path(f"{run}.log")
    assert state == "COMPLETED", log.read_text() if log.exists() else state
