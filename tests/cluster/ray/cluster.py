"""A real Ray cluster on this machine, for tests: a head without CPUs, and workers.

Each node is a machine of its own (daemons.py) with an address of its own within loopback, and
with a cache of its own for runs at a URL.
Calls need the cluster's token.
"""

import json
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.cluster.daemons import Daemons, free_ports, require_root, wait_until

CPUS = 2
OBJECT_STORE_BYTES = 80_000_000
SESSIONS = Path("/tmp/ray")
"""Where Ray has its files; each node sees a folder of its own there."""


class Cluster:
    """A Ray cluster whose whole state is in ``folder``."""

    def __init__(self, folder: Path, workers: int = 2) -> None:
        self.folder = folder.resolve()
        self.workers = [f"worker{number}" for number in range(1, workers + 1)]
        self.token = secrets.token_hex(32)
        self._daemons = Daemons(self.folder, self.environment)
        self._choose_ports()

    @property
    def environment(self) -> dict[str, str]:
        """What a user of this cluster has in the environment."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {
            "PATH": path,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def up(self) -> None:
        """Brings the cluster up until all nodes are known; a failure leaves nothing running."""
        require_root()
        self.folder.mkdir(parents=True, exist_ok=True)
        SESSIONS.mkdir(exist_ok=True)
        try:
            self._start_all()
        except RuntimeError:
            self._choose_ports()  # a free one may be another program's by the time it is used
            self._start_all()

    def _choose_ports(self) -> None:
        self._port, dashboard, self._client_port = free_ports(3)
        self.address = f"http://127.0.0.1:{dashboard}"

    def _start_all(self) -> None:
        self._daemons.write_hosts({node: self._ip(node) for node in ("head", *self.workers)})
        try:
            self._start(
                "head",
                "--head",
                f"--port={self._port}",
                "--num-cpus=0",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={self.address.rpartition(':')[2]}",
                f"--ray-client-server-port={self._client_port}",
            )
            self._wait_for(["head"])
            for worker in self.workers:
                self.start_worker(worker)
            self.wait_until_all_there()
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Ends every process of the cluster, however much of it is up."""
        self._daemons.kill_all()

    def start_worker(self, worker: str) -> None:
        """Switches a worker on; it joins within seconds."""
        self._start(worker, f"--address={self._ip('head')}:{self._port}", f"--num-cpus={CPUS}")

    def power_cut(self, node: str) -> None:
        """Kills everything on a node at once; Ray has to find out by itself."""
        self._daemons.kill(node)

    def wait_until_all_there(self) -> None:
        """Waits until every node has joined; a process that has ended is an error."""
        self._wait_for(["head", *self.workers])

    def _wait_for(self, nodes: Sequence[str]) -> None:
        def there() -> bool:
            return bool(self._daemons.dead(nodes)) or self._alive() == len(nodes)

        come = wait_until(there)
        for node in self._daemons.dead(nodes):
            raise RuntimeError(f"{node} is not up: {self._daemons.tail(node)}")
        if not come:
            raise RuntimeError(f"{self._alive()} nodes of {len(nodes)} are there")

    def settle(self) -> None:
        """Stops all jobs and brings back every worker, as after ``up``."""
        jobs = self.jobs()
        for job in jobs.list_jobs():
            if job.submission_id and not job.status.is_terminal():
                jobs.stop_job(job.submission_id)
        for worker in self._daemons.dead(self.workers):
            self.start_worker(worker)
        self.wait_until_all_there()

    def jobs(self) -> Any:
        """Ray's own client of the Jobs API."""
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(self.address, headers={"Authorization": f"Bearer {self.token}"})

    def _alive(self) -> int:
        """How many nodes are there; none while the dashboard does not answer."""
        import requests

        try:
            told = requests.get(
                f"{self.address}/nodes?view=summary",
                headers={"Authorization": f"Bearer {self.token}"},
                timeout=10,
            )
            nodes = json.loads(told.text)["data"]["summary"]
        except (OSError, ValueError, KeyError):
            return 0
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

    def _start(self, node: str, *options: str) -> None:
        own = self.folder / node
        own.mkdir(exist_ok=True)
        command = [
            "env",
            f"LLMSCALE_CACHE={own / 'cache'}",
            str(Path(sys.executable).parent / "ray"),
            "start",
            "--block",
            f"--node-ip-address={self._ip(node)}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--dashboard-agent-listen-port=0",
            *options,
        ]
        self._daemons.start_machine(node, command, {SESSIONS: own})

    def _ip(self, node: str) -> str:
        return f"127.0.2.{('head', *self.workers).index(node) + 1}"
