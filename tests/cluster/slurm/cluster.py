"""A real SLURM cluster on this machine, for tests.

Debian's slurmctld and slurmd, one slurmd a node, each on a machine of its own (daemons.py).
"""

import os
import secrets
import shlex
import socket
import stat
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path

from tests.cluster.daemons import PATIENCE, Daemons, free_ports, one_line, require_root, wait_until

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
        self._daemons = Daemons(self.folder, self.environment)

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
        self._daemons.kill_all()

    def start_node(self, node: str) -> None:
        """Switches a node on; it is idle once it has registered."""
        slurmd = ["slurmd", "-D", "-f", self.environment["SLURM_CONF"], "-N", node]
        self._daemons.start_machine(node, slurmd)

    def power_cut(self, node: str) -> None:
        """Kills everything on a node at once; SLURM has to find out by itself."""
        self._daemons.kill(node)

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

    def wait_for(self, job: str, states: Collection[str], seconds: float = PATIENCE) -> str:
        """Waits until a job is in one of these states; returns which."""
        if not wait_until(lambda: self.state(job) in states, seconds):
            raise RuntimeError(
                f"job {job} is {self.state(job)} ({self.job(job)['Reason']}),"
                f" not {' or '.join(states)}, after {seconds} s"
            )
        return self.state(job)

    def wait_until_idle(self, seconds: float = PATIENCE) -> None:
        """Waits until every node is idle; a daemon that is not up is an error."""
        wait_until(lambda: bool(self._dead()) or not self._busy_nodes(), seconds)
        if dead := self._dead():
            raise RuntimeError(f"{dead[0]} is not up: {self._daemons.tail(dead[0])}")
        if busy := self._busy_nodes():
            raise RuntimeError(f"{busy[0]} is not idle: {self._daemons.tail(busy[0])}")

    def settle(self) -> None:
        """Cancels every job and brings back every node, as after ``up``."""
        for node in self.nodes:
            if not self._daemons.process(node):
                self.mark_down(node)
                self.start_node(node)
        for cancel in (["--signal=KILL", "--full"], []):
            self._try("scancel", *cancel, "--user=root")
        for node in self._busy_nodes():
            self._try("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.wait_until_idle()

    def _refuse_what_cannot_work(self) -> None:
        require_root()
        if any(character.isspace() for character in str(self.folder)):
            raise RuntimeError(f"slurm.conf can't name a folder with spaces: {self.folder}")
        if self._daemons.any_runs():
            raise RuntimeError(f"a cluster is up in {self.folder} already")

    def _start_daemons(self) -> None:
        self._write_files()
        try:
            self._start_munged()
            self._daemons.start(
                "slurmctld", ["slurmctld", "-D", "-f", self.environment["SLURM_CONF"]]
            )
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
        self._daemons.write_hosts(addresses)
        texts = {
            "slurm.conf": SLURM_CONF.format(
                host=host, port=port, folder=self.folder, nodes="\n".join(nodes)
            ),
            "gres.conf": "".join(f"Name=gpu File={gpu}\n" for gpu in self._pretend_gpus()),
            # slurmd ends at once where it looks for cgroups that are not mounted
            "cgroup.conf": "CgroupPlugin=cgroup/v1\n",
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
        self._daemons.start("munged", ["munged", "--foreground", "--force", *options])
        wait_until(lambda: sock.exists() or not self._daemons.process("munged"))
        if not sock.exists():
            raise RuntimeError(f"munged is not up: {self._daemons.tail('munged')}")

    def _dead(self) -> list[str]:
        return self._daemons.dead(("munged", "slurmctld", *self.nodes))

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
