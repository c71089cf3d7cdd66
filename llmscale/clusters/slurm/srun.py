"""``srun``: the command that starts a job's ranks as tasks, and what its words mean."""

import os
import re
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from ClusterShell.NodeSet import NodeSet

from llmscale.clusters.base import Job
from llmscale.clusters.slurm.settings import SlurmSettings
from llmscale.parallel.exchange import LAUNCHER_VARIABLE, Exchange

LOAD_MODULES = 'while [ "$1" != -- ]; do module load "$1" || exit; shift; done; shift; exec "$@"'

TASK_ENDED = re.compile(r"srun: error: \S+: tasks? (?P<tasks>[\d,\[\]-]+): (?P<how>.+)")
NODE_LOST = re.compile(r"srun: error: Node failure on (?P<nodes>\S+)")
TORCHRUN_RANK_ENDED = re.compile(
    r"(?P<task>\d+): .*failed \(exitcode: (?P<code>-?\d+)\) local_rank: (?P<local>\d+)"
)
EXIT_CODE = re.compile(r"Exited with exit code (\d+)")
SIGNAL_BY_WORDS = {
    **{signal.strsignal(number): number for number in signal.valid_signals()},
    "Out Of Memory": signal.SIGKILL,
}
TERMINATING = "Terminating StepId="


@dataclass(frozen=True)
class Step:
    """A job's ranks as tasks of a step: a task a rank, or with torchrun a task a node."""

    job: Job
    settings: SlurmSettings

    @property
    def torchrun(self) -> bool:
        """Whether torchrun starts the ranks of each node."""
        return self.settings.launcher == "torchrun" and self.job.task.ranks > 1

    @property
    def tasks(self) -> int:
        """Processes that srun starts."""
        return self.job.task.nodes if self.torchrun else self.job.task.ranks

    @property
    def ranks_per_task(self) -> int:
        """Ranks that each of srun's tasks stands for."""
        return self.job.task.ranks // self.tasks

    def command(self) -> list[str]:
        """srun's arguments; no shell reads them."""
        nodes, settings = self.job.task.nodes, self.settings
        per_node = self.tasks // nodes
        cores = (settings.cpus_per_rank or 0) * self.ranks_per_task
        cores = cores or max(1, int(os.environ.get("SLURM_CPUS_ON_NODE", "1")) // per_node)
        command = [
            "srun",
            f"--nodes={nodes}",
            f"--ntasks={self.tasks}",
            f"--ntasks-per-node={per_node}",
            f"--cpus-per-task={cores}",
            f"--job-name={self.job.stage}.{self.job.task.name}",
            "--distribution=block:block",
            "--kill-on-bad-exit=1",
            "--overlap",
            "--label",
            "--export=ALL",
            *self._container_options(),
        ]
        if settings.modules:
            command += ["bash", "-lc", LOAD_MODULES, "modules", *settings.modules, "--"]
        python = settings.container.python if settings.container else sys.executable
        entry = "llmscale.clusters.slurm.torchrun" if self.torchrun else "llmscale.rank_process"
        return [*command, python, "-m", entry, self.job.to_json()]

    def _container_options(self) -> list[str]:
        container = self.settings.container
        if container is None:
            return []
        folder = self.job.run_folder
        names = [LAUNCHER_VARIABLE, "PYTHONPATH", "PYTHONSAFEPATH", *self.settings.environment]
        return [
            f"--container-image={container.image}",
            f"--container-mounts={','.join([f'{folder}:{folder}', *container.mounts])}",
            f"--container-env={','.join(names)}",
        ]

    def environment(self, meeting: Exchange) -> dict[str, str]:
        """What the ranks find in their environment."""
        own = {LAUNCHER_VARIABLE: meeting.variable(), "PYTHONSAFEPATH": "1"}
        return {**os.environ, **self.settings.environment, **own}

    def exit_codes(self, said: Iterable[str]) -> dict[int, int | None]:
        """Of the ranks whose end srun or torchrun told, those told first first."""
        codes: dict[int, int | None] = {}
        terminating = False
        for line in said:
            terminating = terminating or TERMINATING in line
            if self.torchrun and (ended := TORCHRUN_RANK_ENDED.search(line)):
                rank = int(ended["task"]) * self.ranks_per_task + int(ended["local"])
                codes.setdefault(rank, int(ended["code"]))
            elif ended := TASK_ENDED.search(line):
                for task in NodeSet(
                    ended["tasks"] if "[" in ended["tasks"] else f"[{ended['tasks']}]"
                ):
                    first = int(task) * self.ranks_per_task
                    for rank in range(first, first + self.ranks_per_task):
                        codes.setdefault(rank, _exit_code(ended["how"], terminating))
        return codes


def lost_nodes(said: Iterable[str]) -> list[str]:
    """Nodes that srun saw fail."""
    return [node for line in said for lost in NODE_LOST.finditer(line) for node in NodeSet(lost[1])]


def _exit_code(how: str, terminating: bool) -> int | None:
    """The exit code that srun's words mean; negative for a signal.

    Args:
        terminating: whether srun ends the step already, and with it kills its tasks itself.
    """
    if (code := EXIT_CODE.search(how)) is not None:
        return int(code[1])
    number = SIGNAL_BY_WORDS.get(how.removesuffix(" (core dumped)"))
    return -number if number and not terminating else None
