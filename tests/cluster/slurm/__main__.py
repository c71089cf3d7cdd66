"""``python -m tests.cluster.slurm up DIR [NODES]`` and ``down DIR``."""

import argparse
import shlex
import sys
from pathlib import Path

from tests.cluster.slurm.cluster import Cluster


def main() -> None:
    """Brings a cluster up and says how to use it, or takes it down."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.slurm")
    actions = parser.add_subparsers(dest="action", required=True)
    for action in ("up", "down"):
        actions.add_parser(action).add_argument("folder", metavar="DIR", type=Path)
    actions.choices["up"].add_argument("nodes", metavar="NODES", type=int, nargs="?", default=2)
    arguments = parser.parse_args()
    try:
        if arguments.action == "down":
            Cluster(arguments.folder).down()
        else:
            cluster = Cluster(arguments.folder, arguments.nodes)
            cluster.up()
            for name, value in cluster.environment.items():
                print(f"export {name}={shlex.quote(value)}")
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


main()
