"""How the processes of a step find each other: by asking the launcher, at no fixed port.

The first process tells the launcher where it listens, the others ask and are answered once
it is known; nobody sleeps, and no file has to travel through a shared file system. Each
also tells the node it is on, so that a failure can be laid to a node.
"""

import hmac
import ipaddress
import json
import os
import secrets
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

LOOPBACK = "127.0.0.1"
LAUNCHER_VARIABLE = "LLMSCALE_LAUNCHER"
NODE_VARIABLE = "LLMSCALE_NODE"
"""The address by which a rank's node is known to its launcher, if it gave one."""
RANK_VARIABLE = "LLMSCALE_RANK"
CORES_VARIABLE = "LLMSCALE_CORES"
"""How many cores a rank was given."""
SECONDS_TO_CONNECT = 5.0
SECONDS_TO_MEET = 1800.0


def own_hosts() -> list[str]:
    """Names and addresses by which other nodes may reach this one, the likeliest first."""
    names = [_given_name(), socket.gethostname()]
    addresses = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET and not ipaddress.ip_address(entry.address).is_loopback
    ]
    return list(dict.fromkeys(name for name in [*names, *addresses, LOOPBACK] if name))


def own_address() -> str:
    """The address at which all others reach this process; empty if that is not certain."""
    if json.loads(os.environ[LAUNCHER_VARIABLE])["hosts"] == [LOOPBACK]:
        return LOOPBACK
    return os.environ.get(NODE_VARIABLE, "")


def _given_name() -> str:
    return os.environ.get(NODE_VARIABLE) or os.environ.get("SLURMD_NODENAME") or ""


def connect(hosts: list[str], port: int) -> socket.socket:
    """A connection to the first of the hosts that answers.

    Raises:
        ConnectionError: if none does.
    """
    for host in hosts:
        try:
            return socket.create_connection((host, port), SECONDS_TO_CONNECT)
        except OSError:
            continue
    raise ConnectionError(
        f"no way from {socket.gethostname()} to port {port} of {' or '.join(hosts)}"
    )


@dataclass
class Exchange:
    """The launcher's side: where the first process listens, and which node each is on."""

    token: str
    bound: str
    address: dict[str, Any] | None = None
    nodes: dict[int, str] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)
    port: int = 0

    def variable(self) -> str:
        """What the processes are given, by ``LLMSCALE_LAUNCHER``."""
        hosts = [self.bound] if self.bound else own_hosts()
        return json.dumps({"hosts": hosts, "port": self.port, "token": self.token})

    def answer(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """What a process is told, once it is known. None for a stranger, or after long."""
        if not hmac.compare_digest(str(request.get("token", "")), self.token):
            return None
        with self.changed:
            self.nodes[int(request["number"])] = str(request["node"])
            if request.get("address"):
                self.address = request["address"]
                self.changed.notify_all()
            self.changed.wait_for(lambda: self.address is not None, SECONDS_TO_MEET)
            return self.address


@contextmanager
def exchange(address: str = "") -> Iterator[Exchange]:
    """The launcher's side, listening for as long as the context lasts.

    Args:
        address: the one to listen at, such as loopback's if all processes are on this node;
            empty for all.
    """
    meeting = Exchange(secrets.token_hex(16), address)

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            answer = meeting.answer(json.loads(self.rfile.readline(2**16)))
            if answer is not None:
                self.wfile.write(json.dumps(answer).encode() + b"\n")

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 4096

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A stranger's noise, or a process that died while it waited, is no matter."""

    with Server((address, 0), Handler) as server:
        meeting.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield meeting
        finally:
            server.shutdown()


def tell(number: int, address: dict[str, Any] | None = None) -> dict[str, Any]:
    """A process's side: tells its node, and the first one's address; returns that address.

    Raises:
        ConnectionError: if the launcher cannot be reached, or has nothing to tell.
    """
    launcher = json.loads(os.environ[LAUNCHER_VARIABLE])
    node = _given_name() or socket.gethostname()
    request = {"token": launcher["token"], "number": number, "node": node, "address": address}
    with connect(launcher["hosts"], launcher["port"]) as line:
        line.settimeout(None)
        line.sendall(json.dumps(request).encode() + b"\n")
        answer = line.makefile("rb").readline()
    if not answer:
        raise ConnectionError("the launcher has ended")
    found: dict[str, Any] = json.loads(answer)
    return found
