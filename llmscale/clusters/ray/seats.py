"""Where ranks run on a Ray cluster: a placement group, and an actor in each of its bundles."""

import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from llmscale.clusters.base import Task
from llmscale.clusters.ray.rank_actor import RankActor

POLL_SECONDS = 0.2
SECONDS_TO_END = 10.0
SECONDS_TO_CONNECT = 2.0
CALLS_AT_ONCE = 4
"""Of one actor: it waits for its rank, and answers meanwhile."""


@dataclass(frozen=True)
class Seat:
    """A rank's place on the cluster.

    Attributes:
        node: the address of its node.
        port: where the node's raylet listens.
        local_rank: its number among the ranks of the node.
        local_ranks: how many those are.
    """

    actor: Any
    rank: int
    node: str
    port: int
    local_rank: int
    local_ranks: int


def bundle(cpus_per_rank: int, gpus: bool) -> dict[str, float]:
    """The resources of one rank."""
    return {"CPU": float(cpus_per_rank), **({"GPU": 1.0} if gpus else {})}


def in_words(ranks: int, resources: Mapping[str, float]) -> str:
    """Resources of that many ranks, for people."""
    totals = ", ".join(f"{ranks * each:g} {name}" for name, each in resources.items())
    return f"{totals} for {ranks} rank{'s' if ranks > 1 else ''}"


def what_is_there(resources: Mapping[str, float]) -> str:
    """How much of some kinds of resources the cluster's nodes have, and how much is free."""
    total, free = ray.cluster_resources(), ray.available_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    kinds = ", ".join(
        f"{total.get(name, 0):g} {name} ({free.get(name, 0):g} free)" for name in resources
    )
    return f"the cluster has {nodes} node{'s' if nodes > 1 else ''} with {kinds}"


@contextmanager
def asked_for(
    name: str, bundles: Sequence[Mapping[str, float]], strategy: str
) -> Iterator[PlacementGroup]:
    """A placement group that is asked for, and given back at the end."""
    group = placement_group(
        [dict(each) for each in bundles],
        strategy=strategy.upper(),
        name=f"{name} {secrets.token_hex(3)}",  # one's name is taken for a while after its end
    )
    try:
        yield group
    finally:
        remove_placement_group(group)


def wait_for(group: PlacementGroup, keep_waiting: Callable[[], bool]) -> bool:
    """Whether the group's resources came before the waiting ended."""
    while not granted(group):
        if not keep_waiting():
            return False
        time.sleep(POLL_SECONDS)
    return True


def granted(group: PlacementGroup) -> bool:
    """Whether the group has its resources."""
    return placement_group_table(group).get("state") == "CREATED"


def order_by_node(node_of_bundle: Mapping[int, str]) -> list[int]:
    """Bundles in the order of ranks: those of a node in a row, nodes with most first."""
    sizes = Counter(node_of_bundle.values())
    return sorted(
        node_of_bundle,
        key=lambda number: (-sizes[node_of_bundle[number]], node_of_bundle[number], number),
    )


@contextmanager
def seated(group: PlacementGroup, stage: str, task: Task, start: int) -> Iterator[list[Seat]]:
    """An actor for each rank of a task, in the order of ranks; all are ended at the end.

    Args:
        start: the number of this start of the task, which tells its actors from earlier ones.

    Raises:
        ConnectionError: if a node of the group is gone by now.
    """
    there = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    placed = placement_group_table(group)["bundles_to_node_id"]
    if not set(placed.values()) <= set(there):
        raise ConnectionError("a node was lost as its ranks were to start")
    # by the node's id: one that came back is known by its address twice for a while
    ports = {number: there[node]["NodeManagerPort"] for number, node in placed.items()}
    nodes = {number: there[node]["NodeManagerAddress"] for number, node in placed.items()}
    kind = ray.remote(RankActor)
    seats: list[Seat] = []
    for rank, number in enumerate(order_by_node(nodes)):
        resources = group.bundle_specs[number]
        actor = kind.options(
            name=f"{stage}/rank-{rank}" + (f" start {start}" if start > 1 else ""),
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            max_concurrency=CALLS_AT_ONCE,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=number
            ),
        ).remote()
        before = [seat.node for seat in seats]
        here = nodes[number]
        local_ranks = list(nodes.values()).count(here)
        seats.append(Seat(actor, rank, here, ports[number], before.count(here), local_ranks))
    try:
        yield seats
    finally:
        _end(seats)


def _end(seats: Sequence[Seat]) -> None:
    """Ends the ranks, wherever that is still possible, and then their actors."""
    ended = [seat.actor.end.remote() for seat in seats]
    ray.wait(ended, num_returns=len(ended), timeout=SECONDS_TO_END)
    for seat in seats:
        ray.kill(seat.actor)


def lost_nodes(seats: Iterable[Seat]) -> list[str]:
    """The nodes of some seats where no raylet takes a connection.

    Ray itself is slower to tell: it waits for several of a node's heartbeats.
    """
    ports = {seat.node: seat.port for seat in seats}
    return sorted(node for node, port in ports.items() if not _listens(node, port))


def _listens(node: str, port: int) -> bool:
    try:
        socket.create_connection((node, port), SECONDS_TO_CONNECT).close()
    except OSError:
        return False
    return True


def told_placement(seats: Sequence[Seat], neighbours: int) -> str:
    """Which ranks are where, in a line.

    Args:
        neighbours: so many ranks in a row talk at every layer, and belong on one node.
    """
    nodes = dict.fromkeys(seat.node for seat in seats)
    parts = []
    for node in nodes:
        ranks = [seat.rank for seat in seats if seat.node == node]
        span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
        parts.append(f"{span} on {node}")
    line = ", ".join(parts)
    torn = [
        first
        for first in range(0, len(seats), neighbours)
        if len({seat.node for seat in seats[first : first + neighbours]}) > 1
    ]
    if torn:
        line += (
            f"; tensor-parallel ranks {torn[0]}-{torn[0] + neighbours - 1} are on different "
            "nodes, which is slow: use nodes that hold whole groups"
        )
    elif neighbours > 1:
        line += f"; tensor-parallel groups of {neighbours} are each on one node"
    return line
