"""Small runs of the shipped quickstart on the test cluster."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.daemons import PATIENCE
from tests.cluster.ray.cluster import Cluster
from tests.cluster.runs import SMALL, TWO_NODES, until
from tests.conftest import QUICKSTART, ROOT

ON_TWO_WORKERS = [*TWO_NODES, "cluster.ray={placement: strict_spread}"]
TRAINING = [*SMALL, *ON_TWO_WORKERS, "--stages", "corpus,tokenizer,pretrain"]


def command(cluster: Cluster, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command, as a user of that cluster runs it."""
    return subprocess.run(
        [str(word) for word in arguments],
        capture_output=True,
        text=True,
        env=environment(cluster),
        cwd=ROOT,
        timeout=PATIENCE,
    )


def llmscale(cluster: Cluster, *arguments: object) -> subprocess.CompletedProcess[str]:
    """``llmscale``, as a user of that cluster runs it."""
    return command(cluster, sys.executable, "-m", "llmscale", *arguments)


def environment(cluster: Cluster) -> dict[str, str]:
    """A user's environment."""
    return {**os.environ, **cluster.environment}


def status(cluster: Cluster, run: Path) -> dict[str, Any]:
    """What ``llmscale status --json`` tells."""
    told = llmscale(cluster, "status", run, "--json")
    assert told.returncode == 0, told.stderr
    answer: dict[str, Any] = json.loads(told.stdout)
    return answer


def submit(
    cluster: Cluster,
    run: Path | str,
    *arguments: object,
    recipe: Path = QUICKSTART,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Submits a recipe by Ray's Jobs API, without an upload; returns the job's id.

    Args:
        variables: what the job and its actors find in their environment.
    """
    words = ["llmscale", "run", recipe, *arguments, "--run-dir", run]
    told = {"env_vars": dict(variables or {})}
    entrypoint = shlex.join(map(str, words))
    return str(cluster.jobs().submit_job(entrypoint=entrypoint, runtime_env=told))


def ended(cluster: Cluster, job: str) -> str:
    """How a job has ended, waited for."""
    jobs = cluster.jobs()
    until(lambda: jobs.get_job_status(job).is_terminal())
    return str(jobs.get_job_status(job).value)


def succeeded(cluster: Cluster, job: str) -> str:
    """What a job said, which must end well."""
    state = ended(cluster, job)
    said = str(cluster.jobs().get_job_logs(job))
    assert state == "SUCCEEDED", said
    return said


def actor_of(rank: psutil.Process) -> psutil.Process:
    """The actor whose child a rank's process is."""
    actor = rank.parent()
    assert actor is not None and "ray::RankActor" in " ".join(actor.cmdline()), actor
    return actor
