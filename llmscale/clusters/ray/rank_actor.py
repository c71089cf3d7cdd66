"""The actor that stands for a rank on a Ray node: it starts the rank's process and minds it."""

import ipaddress
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import psutil
import ray

from llmscale.artifacts import RunFolder
from llmscale.clusters.base import Job
from llmscale.clusters.carried import Carrier
from llmscale.clusters.snapshot import code_of
from llmscale.mirror import cached
from llmscale.parallel.exchange import NODE_VARIABLE

SIGNAL_TO_SAVE = signal.SIGTERM


class RankActor:
    """Has a rank's process as its child, which ends when the actor does.

    The rank has a process of its own so that it runs as under any other launcher: its
    environment set before torch is imported, asked to stop by a signal, its end an exit code.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._carrier: Carrier | None = None

    def fetch(self, job: str) -> None:
        """Brings what the task reads to this node, for all its ranks; where the run is at a URL.

        Raises:
            LlmscaleError: if the storage cannot be reached, or refuses.
        """
        self._carrier = Carrier(here(Job.from_json(job)))
        self._carrier.begin()

    def send(self) -> None:
        """Sends what the task wrote on this node, after ``fetch``.

        Raises:
            LlmscaleError: if the storage cannot be reached, or refuses.
        """
        if self._carrier is not None:
            self._carrier.end()

    def start(self, job: str, environment: Mapping[str, str]) -> None:
        """Starts the rank.

        Raises:
            FileNotFoundError: if this node does not see the run folder.
        """
        own = here(Job.from_json(job))
        folder = own.run_folder
        address = ray.util.get_node_ip_address()
        if not (Path(folder) / "recipe.yaml").is_file():
            raise FileNotFoundError(f"node {address} does not see {folder}")
        interface = interface_of(address)
        sockets = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llmscale.rank_process", own.to_json()],
            stdin=subprocess.PIPE,  # closed when this actor ends, which ends the rank
            env={
                **({} if interface is None else sockets),
                **os.environ,
                NODE_VARIABLE: address,
                **environment,
                **_own_code(own),
            },
        )

    def wait(self) -> int:
        """The rank's exit code, once it has ended; negative for a signal."""
        assert self._process is not None, "a rank is started before it is waited for"
        return self._process.wait()

    def ask(self) -> None:
        """Asks the rank to save and stop."""
        if self._process is not None:
            self._process.send_signal(SIGNAL_TO_SAVE)

    def end(self) -> None:
        """Ends the rank at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def here(job: Job) -> Job:
    """A job with this node's own cache as its run folder, where the run is at a URL."""
    return job if job.url is None else replace(job, run_folder=cached(job.url))


def _own_code(job: Job) -> dict[str, str]:
    """The run's copy of the package, where each node has one of its own, before what was there."""
    code = code_of(RunFolder(job.run_folder))
    if job.url is None or code is None:
        return {}
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(code), *([before] if before else [])])}


def interface_of(address: str) -> str | None:
    """The network interface that has an address; None if no interface says so."""
    loopback = ipaddress.ip_address(address).is_loopback
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.address == address or (loopback and entry.address == "127.0.0.1"):
                return name
    return None
