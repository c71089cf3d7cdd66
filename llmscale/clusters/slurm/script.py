"""Batch scripts: what a job asks of SLURM, and the one command that it runs."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmscale.clusters.base import ClusterSettings, Job
from llmscale.clusters.slurm.settings import SlurmSettings
from llmscale.errors import RecipeError

MEMBER = "\0"
"""In an argument of an array's command: the member's number, in three digits."""

READ_BY_SLURM = re.compile(r"[%\\\x00-\x1f\x7f]")
PLAIN = re.compile(r"[\w./,:@%+=()&|\[\]*-]+")


@dataclass(frozen=True)
class BatchJob:
    """One job of a run: a task of a stage, or a whole sweep.

    Attributes:
        name: as SLURM shows it.
        needs: the nodes, ranks and devices it asks for, as a task of that size would.
        command: the arguments of what it runs; those of an array may hold ``MEMBER``.
        python_path: a folder with the package as it was submitted, if it is not installed.
        excluded: nodes that failed before.
        array: the numbers of an array's members, as SLURM writes them.
    """

    name: str
    needs: Job
    command: tuple[str, ...]
    python_path: Path | None = None
    excluded: tuple[str, ...] = ()
    array: str | None = None

    def script(self, cluster: ClusterSettings) -> str:
        """The batch script.

        Raises:
            RecipeError: if the run folder's path cannot stand in one.
        """
        lines = ["#!/bin/bash"]
        for name, value in self._options(cluster):
            lines.append(f"#SBATCH --{name}" + (f"={_quoted(value)}" if value else ""))
        lines += [f"#SBATCH {_extra(line)}" for line in _settings(cluster).extra_lines]
        if self.python_path is not None:
            lines.append(f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(self.python_path))}")
        lines.append(f"exec {' '.join(map(_argument, self.command))}")
        return "\n".join(lines) + "\n"

    def _options(self, cluster: ClusterSettings) -> Iterator[tuple[str, str]]:
        task, settings = self.needs.task, _settings(cluster)
        per_node = task.ranks // task.nodes
        log = "%A_%a.log" if self.array else "%j.log"
        yield "job-name", self.name
        if self.array is not None:
            yield "array", self.array
        yield "nodes", str(task.nodes)
        yield "ntasks-per-node", str(per_node)
        if settings.cpus_per_rank is not None:
            share = cluster.ranks_per_node // per_node if task.nodes == 1 else 1
            yield "cpus-per-task", str(settings.cpus_per_rank * share)
        gpus = gpus_per_node(cluster)
        if task.on_device and gpus:
            yield "gpus-per-node", str(gpus if task.ranks > 1 else 1)
        yield from settings.options()
        if self.excluded:
            yield "exclude", ",".join(self.excluded)
        yield "output", f"{_for_output(self.needs.run_folder)}/slurm/{log}"
        yield "open-mode", "append"
        yield "requeue", ""
        yield "signal", f"B:USR1@{settings.save_seconds}"
        yield "kill-on-invalid-dep", "yes"


def gpus_per_node(cluster: ClusterSettings) -> int:
    """GPUs that a training job asks for on each node: as many as ranks, unless told."""
    asked = _settings(cluster).gpus_per_node
    if asked is not None:
        return asked
    return cluster.ranks_per_node if cluster.device == "cuda" else 0


def _settings(cluster: ClusterSettings) -> SlurmSettings:
    return cluster.slurm or SlurmSettings()


def _extra(line: str) -> str:
    name, equals, value = line.partition("=")
    return f"{name}={_quoted(value)}" if equals else name


def _for_output(folder: Path) -> str:
    """A path in which SLURM, which replaces %j and the like, has nothing to replace."""
    if READ_BY_SLURM.search(str(folder)):
        raise RecipeError(
            f"{folder}: SLURM reads %, \\ and line ends in a path; choose another --run-dir"
        )
    return str(folder)


def _argument(text: str) -> str:
    """An argument as the shell reads it: nothing in it is replaced but ``MEMBER``."""
    number = '"$(printf %03d "$SLURM_ARRAY_TASK_ID")"'
    parts = text.split(MEMBER)
    return number.join(shlex.quote(part) if part or len(parts) == 1 else "" for part in parts)


def _quoted(value: str) -> str:
    """A value as sbatch reads it in a script: it knows quotes and backslashes, and no more."""
    if PLAIN.fullmatch(value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
