"""SLURM's own commands, each as a function; nothing here goes through a shell."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from llmscale.clusters.slurm.settings import SlurmSettings
from llmscale.errors import MachineError

SECONDS_TO_ANSWER = 60
OUT_OF_ORDER = {"DOWN", "ERROR", "FAIL", "FAILING", "NOT_RESPONDING"}
IN_QUEUE = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "CONFIGURING", "RESIZING")
AT_WORK = ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED")


@dataclass(frozen=True)
class JobState:
    """Where a job is in SLURM's queue.

    Attributes:
        state: SLURM's word, such as ``PENDING``.
        reason: why it waits, such as ``Resources``; SLURM's ``None`` is empty.
        nodes: where it runs, as SLURM writes it: ``node[1-2]``.
    """

    state: str
    reason: str = ""
    nodes: str = ""

    def __str__(self) -> str:
        why = f" on {self.nodes}" if self.nodes else f" for {self.reason}" if self.reason else ""
        return self.state + why

    @property
    def live(self) -> bool:
        """Whether the job may still do something."""
        return self.state in IN_QUEUE or self.state in AT_WORK

    @property
    def waiting(self) -> bool:
        """Whether it has yet to start, or to start again."""
        return self.state in IN_QUEUE


def require_slurm() -> None:
    """Checks that SLURM's commands are here, and that its controller answers them.

    Raises:
        MachineError: if they are not, or it does not.
    """
    for command in ("sbatch", "squeue", "scancel", "scontrol"):
        if shutil.which(command) is None:
            raise MachineError(
                f"cluster.on: slurm needs {command}, which is not on PATH; run on a login node "
                "of the cluster, or use --on local"
            )
    try:
        _ask(["scontrol", "ping"])
    except MachineError as error:
        raise MachineError(
            f"cluster.on: slurm does not answer here ({error}); run on a login node of the "
            "cluster, or use --on local"
        ) from None


def require_container_plugin(settings: SlurmSettings) -> None:
    """Checks that srun can start ranks in the recipe's container, if it names one.

    Raises:
        MachineError: if it cannot.
    """
    if settings.container is not None and "--container-image" not in _ask(["srun", "--help"]):
        raise MachineError(
            "cluster.slurm.container: srun has no --container-image here, which NVIDIA's pyxis "
            "gives it; ask the site for pyxis, or remove container"
        )


def submit(arguments: Iterable[str], script: str) -> str:
    """Submits a batch script; returns the job's id.

    Raises:
        MachineError: if SLURM refuses it; the message is SLURM's own.
    """
    # sbatch takes what an enclosing job left in the environment for options of its own
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name == "SLURM_CONF"
    }
    answer = _ask(["sbatch", "--parsable", *arguments], script, clean)
    return answer.strip().split(";")[0]


def job_states(jobs: Iterable[str]) -> dict[str, JobState]:
    """The state of each job that SLURM still knows, in order; of an array, of its members.

    Raises:
        MachineError: if SLURM does not answer.
    """
    wanted = list(jobs)
    if not wanted:
        return {}
    try:
        listed = _ask(
            ["squeue", "-h", "-r", "-t", "all", "-j", ",".join(wanted), "-o", "%i|%A|%T|%r|%N"]
        )
    except MachineError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    found = {}
    for line in listed.splitlines():
        name, alone, state, reason, nodes = line.split("|", 4)
        asked = name if name in wanted else name.split("_")[0]
        if asked not in wanted:  # a member of an array that was asked for by its own id
            name = asked = alone
        found[name] = (asked, JobState(state, "" if reason == "None" else reason, nodes))
    return {name: state for asked in wanted for name, (by, state) in found.items() if by == asked}


def release(job: str) -> None:
    """Lets a job go that was submitted to be held."""
    _ask(["scontrol", "release", job])


def cancel(jobs: Iterable[str]) -> None:
    """Ends jobs, or takes them from the queue."""
    _ask(["scancel", *jobs])


def ask_to_stop(jobs: Iterable[str]) -> None:
    """Sends SIGTERM to the jobs' own process, which has the ranks save first."""
    _ask(["scancel", "--batch", "--signal=TERM", *jobs])


def requeue(job: str) -> None:
    """Puts a job back into the queue under its own id.

    Raises:
        MachineError: if SLURM refuses, or ``scontrol`` is not on this node.
    """
    _ask(["scontrol", "requeue", job])


def exclude(job: str, nodes: Iterable[str]) -> None:
    """Keeps a waiting job off some nodes.

    Raises:
        MachineError: if SLURM refuses, or ``scontrol`` is not on this node.
    """
    _ask(["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}"])


def nodes_out_of_order(nodes: Iterable[str]) -> dict[str, str]:
    """Those of the nodes that SLURM calls down or not answering, and its words for it."""
    wanted = ",".join(nodes)
    if not wanted or shutil.which("scontrol") is None:
        return {}
    listed = _ask(["scontrol", "show", "node", "-o", wanted])
    found = {}
    for line in listed.splitlines():
        fields = dict(re.findall(r"(\w+)=(\S+)", line))
        state = fields.get("State", "")
        if state.endswith("*") or OUT_OF_ORDER & set(state.rstrip("*").split("+")):
            reason = re.search(r"Reason=(.*?)( \[|$)", line)
            found[fields["NodeName"]] = f"{state} ({reason[1]})" if reason else state
    return found


def _ask(
    command: list[str], text: str | None = None, environment: dict[str, str] | None = None
) -> str:
    try:
        done = subprocess.run(
            command,
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            timeout=SECONDS_TO_ANSWER,
            env=environment,
        )
    except FileNotFoundError:
        raise MachineError(f"{command[0]}: is not on PATH here") from None
    except subprocess.TimeoutExpired:
        raise MachineError(
            f"{command[0]}: SLURM did not answer in {SECONDS_TO_ANSWER} s; try again"
        ) from None
    if done.returncode:
        words = " ".join(done.stderr.split()) or f"ended with {done.returncode}"
        raise MachineError(f"{command[0]}: {words}")
    return done.stdout
