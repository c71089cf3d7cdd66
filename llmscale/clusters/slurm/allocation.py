"""Ranks within the allocation of the SLURM job that this process leads."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from ClusterShell.NodeSet import NodeSet

from llmscale.artifacts import RunFolder, StageFolder
from llmscale.clusters.base import Job
from llmscale.clusters.failures import Failure, first_cause, forget_failures, recorded
from llmscale.clusters.history import (
    FINISHED,
    End,
    History,
    Start,
    progress_mark,
    start_until_done,
)
from llmscale.clusters.slurm import commands
from llmscale.clusters.slurm.settings import SlurmSettings
from llmscale.clusters.slurm.srun import Step, lost_nodes
from llmscale.clusters.stops import Stops, deaf_to_sigterm
from llmscale.errors import Interrupted, MachineError
from llmscale.parallel.exchange import exchange

POLL_SECONDS = 0.2
SECONDS_BETWEEN_ASKING = 5.0


@dataclass(frozen=True)
class Allocation:
    """The SLURM job that this process leads.

    Attributes:
        job: its id; an array's member is known as ``ARRAY_NUMBER``, since the job id of its
            own can be that of the whole array.
    """

    job: str
    nodes: tuple[str, ...]
    starts_before: int

    @property
    def is_this_node(self) -> bool:
        """Whether it is the node that this process runs on, and no other."""
        return self.nodes == (os.environ.get("SLURMD_NODENAME"),)

    @staticmethod
    def own() -> "Allocation | None":
        """The one this process was started in; None outside of a job."""
        job = os.environ.get("SLURM_JOB_ID")
        if job is None:
            return None
        if (number := os.environ.get("SLURM_ARRAY_TASK_ID")) is not None:
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{number}"
        nodes = tuple(NodeSet(os.environ.get("SLURM_JOB_NODELIST", "")))
        return Allocation(job, nodes, int(os.environ.get("SLURM_RESTART_COUNT", "0")))


@dataclass(frozen=True)
class SlurmCluster:
    """Runs a job's ranks in an allocation.

    Attributes:
        stops: what this process was asked meanwhile.
        on_tick: called some times a second while ranks run.
        say: told, in a line, what went wrong and is mended.
    """

    allocation: Allocation
    settings: SlurmSettings
    stops: Stops
    on_tick: Callable[[], None]
    say: Callable[[str], None]

    def run(self, job: Job) -> None:
        """Starts the job's ranks, again after a failure that may pass; returns when all are done.

        Raises:
            StageError: if a rank failed for certain, or too often without progress.
            Interrupted: if the ranks were asked to stop, and did.
        """
        history, own = History(job.run_folder), self.allocation.job
        folder = RunFolder(job.run_folder).stage(job.stage)
        if (lost := history.close_lost_start(own, commands.nodes_out_of_order)) is not None:
            self.say(lost)
        nodes = self.allocation.nodes[: job.task.nodes]

        def prepare() -> Start:
            self._leave_bad_nodes(history)
            return Start(own, job.stage, job.task.name, progress_mark(folder), nodes)

        start_until_done(
            history,
            self.settings.restarts,
            prepare=prepare,
            run=lambda _start: self._run_once(job, folder),
            say=self.say,
        )

    def _leave_bad_nodes(self, history: History) -> None:
        """Has SLURM start the job again without the nodes that failed more than once."""
        bad = sorted(set(history.bad_nodes()) & set(self.allocation.nodes))
        if not bad:
            return
        self.say(f"{', '.join(bad)} failed more than once: starting again on other nodes")
        try:
            # a requeue sends SIGTERM to all processes of the job, scontrol's among them
            with deaf_to_sigterm():
                commands.requeue(self.allocation.job)
                commands.exclude(self.allocation.job, history.bad_nodes())
        except MachineError as error:
            self.say(f"going on with {', '.join(bad)} after all: {error}")
            return
        raise Interrupted(f"requeued without {', '.join(bad)}")

    def _run_once(self, job: Job, folder: StageFolder) -> End:
        """Runs the ranks to their end, whatever that is."""
        if self.stops.asked:
            return End(self._why(), stopped=True)
        forget_failures(folder)
        step = Step(job, self.settings)
        with exchange("127.0.0.1" if self.allocation.is_this_node else "") as meeting:
            code, said = self._follow(step.command(), step.environment(meeting))
        own, lost = recorded(folder, 0) or {}, lost_nodes(said)
        stopped = own.get("kind") == "stopped"
        if code == 0 and not stopped:
            return End(FINISHED)
        if self.stops.asked or stopped:
            why = f"node {', '.join(lost)} failed" if lost else self._why()
            return End(f"{why}: {own['cause']}" if stopped else why, lost, stopped=True)
        failure = _failure(step, folder, said)
        node = meeting.nodes.get(failure.rank // step.ranks_per_task)
        blamed = [node] if node and failure.killed and not lost else lost
        return End(failure.line, blamed, failure)

    def _follow(self, command: list[str], environment: dict[str, str]) -> tuple[int, list[str]]:
        """Runs srun to its end; returns its exit code and what it and the tasks said."""
        said: list[str] = []
        srun = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env=environment,
        )
        self.stops.ask = lambda: srun.send_signal(signal.SIGUSR1)
        self.stops.end = srun.terminate
        if self.stops.asked:
            self.stops.ask()
        reader = threading.Thread(target=_listen, args=(srun, said), daemon=True)
        reader.start()
        try:
            self._wait(srun)
        finally:
            if srun.poll() is None:
                srun.terminate()
        reader.join()
        return srun.returncode, said

    def _wait(self, srun: subprocess.Popen[str]) -> None:
        """Waits for srun; asks again, in case a rank was not yet ready to be asked."""
        asked = time.monotonic()
        while True:
            try:
                srun.wait(POLL_SECONDS)
                return
            except subprocess.TimeoutExpired:
                self.on_tick()
            if self.stops.asked and time.monotonic() - asked > SECONDS_BETWEEN_ASKING:
                asked = time.monotonic()
                self.stops.ask()

    def _why(self) -> str:
        if self.stops.by_the_scheduler:
            return "asked to stop, before the time limit or by preemption"
        return "asked to stop"


def _listen(srun: subprocess.Popen[str], said: list[str]) -> None:
    assert srun.stdout is not None, "srun's output is a pipe"
    for line in srun.stdout:
        said.append(line.rstrip("\n"))
        with suppress(OSError):  # a full disk must not stop the reading
            sys.stderr.write(line)
            sys.stderr.flush()


def _failure(step: Step, folder: StageFolder, said: list[str]) -> Failure:
    where = f"{step.job.stage} ({step.job.task.name})"
    if lost := lost_nodes(said):
        return Failure(f"{where}: node {', '.join(lost)} failed", rank=0, killed=True)
    if codes := step.exit_codes(said):
        return first_cause(step.job, folder, codes)
    words = next((line for line in said if line.strip()), "srun ended without a word")
    return Failure(f"{where}: {words}", rank=0)
