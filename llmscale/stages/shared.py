"""What stages have in common whose ranks share texts, and each have a model whole."""

from collections.abc import Iterator
from contextlib import contextmanager

from llmscale.clusters.base import ClusterSettings, Task
from llmscale.settings import Problem
from llmscale.stages.base import Workspace


def sharing_task(ranks: int, on_device: bool) -> Task:
    """The start of so many ranks; fewer give the same."""
    return Task("run", ranks, on_device=on_device, fewer=tuple(range(ranks - 1, 0, -1)))


def sharing_problems(ranks: int, cluster: ClusterSettings) -> Iterator[Problem]:
    """What keeps so many ranks from being on one node."""
    if ranks > cluster.ranks_per_node:
        yield Problem(
            ("ranks",),
            f"{ranks} are more than a node has (cluster.ranks_per_node {cluster.ranks_per_node}); "
            f"use 1 to {cluster.ranks_per_node}",
        )


@contextmanager
def met(workspace: Workspace, device: str) -> Iterator[None]:
    """The ranks of a task in one process group, if there are several; collective."""
    if workspace.ranks == 1:
        yield
        return
    from llmscale.parallel.world import joined_world

    with joined_world(
        rank=workspace.rank, ranks=workspace.ranks, rendezvous=workspace.rendezvous, device=device
    ):
        yield
