"""The processes of a test cluster: daemons and whole machines, known by files of one folder.

A machine is a set of Linux namespaces with a hostname, process ids, /etc/hosts and /dev/shm of
its own, so killing it is a power cut.
"""

import os
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

import psutil

HOST = "localhost"
PATIENCE = 900.0
"""Seconds to wait for what must come, on a machine that does other work besides."""


class Daemons:
    """Processes that outlive the one that started them, and end by name.

    Args:
        folder: where their output and ids are.
        environment: what they find in their environment beside that of this process.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, argv: Sequence[str]) -> None:
        """Starts one."""
        if self.process(name):
            raise RuntimeError(f"{name} is up already")
        with self._output(name).open("wb") as output:
            child = subprocess.Popen(
                argv,
                env=os.environ | dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._children[name] = child
        started = psutil.Process(child.pid).create_time()
        self._pid_file(name).write_text(f"{child.pid} {started}")

    def start_machine(
        self, name: str, argv: Sequence[str], own_folders: Mapping[Path, Path] | None = None
    ) -> None:
        """Starts a machine of that name which runs one program.

        Args:
            own_folders: what the machine has at some paths, instead of what is there outside.
        """
        mounts = {self.folder / "hosts": Path("/etc/hosts"), **_swapped(own_folders or {})}
        steps = [
            f"hostname {name}",
            *(f"mount --bind {_quoted(inside)} {_quoted(at)}" for inside, at in mounts.items()),
            "mount -t tmpfs tmpfs /dev/shm",
            f"{{ {shlex.join(argv)} & }}",
            "wait",
        ]
        namespaces = ["--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.start(name, ["unshare", *namespaces, "sh", "-c", " && ".join(steps)])

    def write_hosts(self, addresses: Mapping[str, str]) -> None:
        """Tells all machines the addresses of some, by name."""
        hosts = {f"{HOST} {socket.gethostname()}": "127.0.0.1", **addresses}
        lines = [f"{address} {name}\n" for name, address in hosts.items()]
        (self.folder / "hosts").write_text("".join(lines))

    def kill(self, name: str) -> None:
        """Ends one at once, and all processes of a machine."""
        process = self.process(name)
        if process:
            # the first process of a machine is the child, whose end waits for all others there
            family = [process, *process.children()]
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            if not wait_until(lambda: not any(map(runs, family))):
                raise RuntimeError(f"{name} (process {process.pid}) could not be killed")
        if name in self._children:
            self._children.pop(name).wait()
        self._pid_file(name).unlink(missing_ok=True)

    def kill_all(self) -> None:
        """Ends all, whoever started them."""
        for file in sorted(self.folder.glob("*.pid")):
            self.kill(file.stem)

    def any_runs(self) -> bool:
        """Whether any is up, whoever started it."""
        return any(self.process(file.stem) for file in self.folder.glob("*.pid"))

    def dead(self, names: Iterable[str]) -> list[str]:
        """Those of some that are not up."""
        return [name for name in names if not self.process(name)]

    def process(self, name: str) -> psutil.Process | None:
        """The process of one, unless its id now belongs to another program.

        Told by the time of its start: a command line is empty while a program is being loaded.
        """
        with suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
            pid, started = self._pid_file(name).read_text().split()
            process = psutil.Process(int(pid))
            if runs(process) and process.create_time() == float(started):
                return process
        return None

    def tail(self, name: str) -> str:
        """The last of what one has said, as one line."""
        return one_line(self._output(name).read_text(errors="replace"))

    def _pid_file(self, name: str) -> Path:
        return self.folder / f"{name}.pid"

    def _output(self, name: str) -> Path:
        return self.folder / f"{name}.out"


class Clusterlike(Protocol):
    """A test cluster of any kind."""

    def up(self) -> None:
        """Brings it up; a failure leaves nothing running."""

    def down(self) -> None:
        """Ends every process of it."""


ClusterT = TypeVar("ClusterT", bound=Clusterlike)


@contextmanager
def running(cluster: ClusterT) -> Iterator[ClusterT]:
    """A cluster that is up inside the block and down after it."""
    cluster.up()
    try:
        yield cluster
    finally:
        cluster.down()


def require_root() -> None:
    """Refuses a user who cannot make machines."""
    if os.geteuid() != 0:
        raise RuntimeError("a test cluster needs root, to give each node its namespaces")


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("", 0))
        return [sock.getsockname()[1] for sock in sockets]


def runs(process: psutil.Process) -> bool:
    """Whether a process has not ended; a zombie has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    """Whether a condition came true in that time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def one_line(text: str, lines: int = 3) -> str:
    """The last lines of a text, as one."""
    return " | ".join(text.strip().splitlines()[-lines:]) or "it said nothing"


def _swapped(own_folders: Mapping[Path, Path]) -> dict[Path, Path]:
    return {inside: at for at, inside in own_folders.items()}


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
