"""A node's task where torchrun starts the ranks: it becomes torchrun, told where to meet."""

import os
import signal
import socket
import sys

from llmscale.clusters.base import Job
from llmscale.parallel.exchange import own_hosts, tell


def main() -> None:
    """Finds the first node through the launcher, then becomes torchrun."""
    written = sys.argv[1]
    task, number = Job.from_json(written).task, int(os.environ["SLURM_PROCID"])
    own = {"hosts": own_hosts(), "port": _free_port()} if number == 0 else None
    address = tell(number, own)
    # torchrun would end at this signal, which srun sends to its ranks too; they handle it
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, with a warning a node
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += [f"--nnodes={task.nodes}", f"--node-rank={number}"]
    command += [f"--nproc-per-node={task.ranks // task.nodes}", "--max-restarts=0"]
    command += [f"--master-addr={_known(address['hosts'])}", f"--master-port={address['port']}"]
    os.execv(sys.executable, [*command, "-m", "llmscale.rank_process", written])


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


def _known(hosts: list[str]) -> str:
    """The first of the names that this node can resolve."""
    for host in hosts:
        try:
            return str(socket.gethostbyname(host))
        except OSError:
            continue
    return hosts[0]


if __name__ == "__main__":
    main()
