"""A real SLURM cluster on this machine, for tests.

Debian's slurmctld and slurmd, one slurmd a node. A node is a set of Linux namespaces with a
hostname, process ids, /etc/hosts and /dev/shm of its own, so killing it is a power cut.
"""

import os
import secrets
import shlex
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
GPUS = 2
CPUS = 8
MEMORY = 16000
CHARACTER_DEVICE_NULL = os.makedev(1, 3)

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/state/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/spool/%n/slurmd.pid
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=10
MinJobAge=86400
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=10
PartitionName=low Nodes=ALL PriorityTier=1 GraceTime=10
"""


class Cluster:
    """A SLURM cluster whose whole state is in ``folder``.

    ``port`` is the first of the ``nodes + 1`` TCP ports to use; without it, free ones are found.
    """

    def __init__(self, folder: Path, nodes: int = 2, port: int | None = None) -> None:
        self.folder = folder.resolve()
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self._port = port
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """What a SLURM client needs in its environment to find this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def up(self) -> None:
        """Brings the cluster up until every node is idle; a failure leaves nothing running."""
        self._refuse_what_cannot_work()
        self.folder.mkdir(parents=True, exist_ok=True)
        install_packages(self.folder / "apt.log")
        try:
            self._start_daemons()
        except RuntimeError:
            if self._port is not None:
                raise
            self._start_daemons()  # a free port may be another program's by the time it is used

    def down(self) -> None:
        """Ends every process of the cluster, however much of it is up."""
        for daemon in sorted(path.stem for path in self.folder.glob("*.pid")):
            self._kill(daemon)

    def start_node(self, node: str) -> None:
        """Switches a node on; it is idle once it has registered."""
        configuration = shlex.quote(self.environment["SLURM_CONF"])
        script = (
            f"hostname {node} && mount --bind {shlex.quote(str(self.folder / 'hosts'))} /etc/hosts"
            f" && mount -t tmpfs tmpfs /dev/shm && {{ slurmd -D -f {configuration} -N {node} & }}"
            " && wait"
        )
        namespaces = ["--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._start(node, ["unshare", *namespaces, "sh", "-c", script])

    def power_cut(self, node: str) -> None:
        """Kills everything on a node at once; SLURM has to find out by itself."""
        self._kill(node)

    def mark_down(self, node: str) -> None:
        """Tells SLURM that a node is down, instead of waiting until it finds out."""
        self.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def command(self, *argv: str) -> str:
        """Runs a SLURM client on this cluster; returns its standard output."""
        done = subprocess.run(
            argv, env=os.environ | self.environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{shlex.join(argv)} failed: {one_line(done.stderr)}")
        return done.stdout

    def submit(self, *argv: str) -> str:
        """Runs ``sbatch`` with these arguments; returns the job's id."""
        return self.command("sbatch", "--parsable", *argv).strip()

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` knows of a job, also after its end."""
        words = self.command("scontrol", "show", "job", job, "-o").splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        """A job's state, such as ``PENDING`` or ``COMPLETED``."""
        return self.job(job)["JobState"]

    def wait_for(self, job: str, states: Collection[str], seconds: float) -> str:
        """Waits until a job is in one of these states; returns which."""
        if not wait_until(lambda: self.state(job) in states, seconds):
            raise RuntimeError(
                f"job {job} is {self.state(job)} ({self.job(job)['Reason']}),"
                f" not {' or '.join(states)}, after {seconds} s"
            )
        return self.state(job)

    def wait_until_idle(self, seconds: float = 30) -> None:
        """Waits until every node is idle; a daemon that is not up is an error."""
        wait_until(lambda: bool(self._dead()) or not self._busy_nodes(), seconds)
        if dead := self._dead():
            raise RuntimeError(f"{dead[0]} is not up: {self._tail(dead[0])}")
        if busy := self._busy_nodes():
            raise RuntimeError(f"{busy[0]} is not idle: {self._tail(busy[0])}")

    def settle(self) -> None:
        """Cancels every job and brings back every node, as after ``up``."""
        for node in self.nodes:
            if not self._process(node):
                self.mark_down(node)
                self.start_node(node)
        for cancel in (["--signal=KILL", "--full"], []):
            self._try("scancel", *cancel, "--user=root")
        for node in self._busy_nodes():
            self._try("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.wait_until_idle()

    def _refuse_what_cannot_work(self) -> None:
        if os.geteuid() != 0:
            raise RuntimeError("a SLURM test cluster needs root, to give each node its namespaces")
        if any(character.isspace() for character in str(self.folder)):
            raise RuntimeError(f"slurm.conf can't name a folder with spaces: {self.folder}")
        if any(self._process(path.stem) for path in self.folder.glob("*.pid")):
            raise RuntimeError(f"a cluster is up in {self.folder} already")

    def _start_daemons(self) -> None:
        self._write_files()
        try:
            self._start_munged()
            self._start("slurmctld", ["slurmctld", "-D", "-f", self.environment["SLURM_CONF"]])
            for node in self.nodes:
                self.start_node(node)
            self.wait_until_idle()
        except BaseException:
            self.down()
            raise

    def _write_files(self) -> None:
        for folder in ("state", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        for gpu in self._pretend_gpus():
            if not gpu.exists():
                os.mknod(gpu, 0o666 | stat.S_IFCHR, CHARACTER_DEVICE_NULL)
        host = socket.gethostname()
        addresses = {node: f"127.0.1.{number}" for number, node in enumerate(self.nodes, 1)}
        port, *ports = self._ports()
        nodes = [
            f"NodeName={node} NodeAddr={address} Port={node_port}"
            f" CPUs={CPUS} RealMemory={MEMORY} Gres=gpu:{GPUS}"
            for (node, address), node_port in zip(addresses.items(), ports, strict=True)
        ]
        hosts = {f"localhost {host}": "127.0.0.1", **addresses}
        texts = {
            "slurm.conf": SLURM_CONF.format(
                host=host, port=port, folder=self.folder, nodes="\n".join(nodes)
            ),
            "gres.conf": "".join(f"Name=gpu File={gpu}\n" for gpu in self._pretend_gpus()),
            # slurmd ends at once where it looks for cgroups that are not mounted
            "cgroup.conf": "CgroupPlugin=cgroup/v1\n",
            "hosts": "".join(f"{address} {name}\n" for name, address in hosts.items()),
        }
        for name, text in texts.items():
            (self.folder / name).write_text(text)

    def _pretend_gpus(self) -> list[Path]:
        return [self.folder / f"gpu{number}" for number in range(GPUS)]

    def _ports(self) -> Sequence[int]:
        count = len(self.nodes) + 1
        return free_ports(count) if self._port is None else range(self._port, self._port + count)

    def _start_munged(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(64))
        sock = self.folder / "munge.sock"
        sock.unlink(missing_ok=True)
        files = {
            "key-file": key,
            "socket": sock,
            "pid-file": self.folder / "state" / "munged.pid",
            "seed-file": self.folder / "state" / "munged.seed",
        }
        options = [f"--{name}={path}" for name, path in files.items()]
        self._start("munged", ["munged", "--foreground", "--force", *options])
        wait_until(lambda: sock.exists() or not self._process("munged"), 10)
        if not sock.exists():
            raise RuntimeError(f"munged is not up: {self._tail('munged')}")

    def _start(self, daemon: str, argv: list[str]) -> None:
        if self._process(daemon):
            raise RuntimeError(f"{daemon} is up already")
        with self._output(daemon).open("wb") as output:
            child = subprocess.Popen(
                argv,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._children[daemon] = child
        started = psutil.Process(child.pid).create_time()
        self._pid_file(daemon).write_text(f"{child.pid} {started}")

    def _kill(self, daemon: str) -> None:
        process = self._process(daemon)
        if process:
            # the first process of a node is the child, whose end waits for all others there
            family = [process, *process.children()]
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            if not wait_until(lambda: not any(map(runs, family)), 10):
                raise RuntimeError(f"{daemon} (process {process.pid}) could not be killed")
        if daemon in self._children:
            self._children.pop(daemon).wait()
        self._pid_file(daemon).unlink(missing_ok=True)

    def _process(self, daemon: str) -> psutil.Process | None:
        """The daemon's process, unless its id now belongs to another program.

        Told by the time of its start: a command line is empty while a program is being loaded.
        """
        with suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
            pid, started = self._pid_file(daemon).read_text().split()
            process = psutil.Process(int(pid))
            if runs(process) and process.create_time() == float(started):
                return process
        return None

    def _pid_file(self, daemon: str) -> Path:
        return self.folder / f"{daemon}.pid"

    def _output(self, daemon: str) -> Path:
        return self.folder / f"{daemon}.out"

    def _dead(self) -> list[str]:
        return [name for name in ("munged", "slurmctld", *self.nodes) if not self._process(name)]

    def _busy_nodes(self) -> list[str]:
        """The nodes that are not idle; all of them while the controller doesn't answer."""
        listed = self._try("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t")
        idle = [line.split()[0] for line in listed.splitlines() if line.endswith(" idle")]
        return [node for node in self.nodes if node not in idle]

    def _try(self, *argv: str) -> str:
        try:
            return self.command(*argv)
        except RuntimeError:
            return ""

    def _tail(self, daemon: str) -> str:
        return one_line(self._output(daemon).read_text(errors="replace"))


@contextmanager
def running_cluster(folder: Path, nodes: int = 2) -> Iterator[Cluster]:
    """A cluster that is up inside the block and down after it."""
    cluster = Cluster(folder, nodes)
    cluster.up()
    try:
        yield cluster
    finally:
        cluster.down()


def install_packages(log: Path) -> None:
    """Installs the Debian packages of SLURM that are missing."""
    if not subprocess.run(["dpkg", "-s", *PACKAGES], capture_output=True).returncode:
        return
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with log.open("w") as output:
        for step in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run([*apt, *step], env=environment, stdout=output, stderr=output)
            if done.returncode:
                raise RuntimeError(f"apt-get {step[0]} failed: {one_line(log.read_text())}")


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


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
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
