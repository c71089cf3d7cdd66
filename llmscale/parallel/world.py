"""Joining the world and making megatron-core's process groups from the layout."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from llmscale.errors import MachineError
from llmscale.parallel import rendezvous as _launcher_scheme  # noqa: F401
from llmscale.parallel.bridge import Bridge, Seat
from llmscale.parallel.exchange import CORES_VARIABLE
from llmscale.parallel.layout import Layout
from llmscale.parallel.memory import keep_freed_memory


@dataclass(frozen=True)
class World:
    """This rank among the others of its group.

    Attributes:
        group: the group's number; a task of one group has number 0 alone.
        bridges: of the first rank of group 0, one to each other group, by number; of a rank of
            another group, the one from there. Other ranks have none.
    """

    rank: int
    ranks: int
    device: torch.device
    group: int = 0
    bridges: Mapping[int, Bridge] = field(default_factory=dict)

    @property
    def first(self) -> bool:
        """Whether this is the first rank of all, which writes what is written once."""
        return self.rank == 0 and self.group == 0


def resolve_device(wanted: str) -> str:
    """``auto`` becomes what the machine has.

    Raises:
        MachineError: if ``cuda`` is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise MachineError("cluster.device is cuda, but torch sees no GPU; set cluster.device=cpu")
    return ("cuda" if available else "cpu") if wanted == "auto" else wanted


@contextmanager
def joined_world(
    *,
    rank: int,
    ranks: int,
    rendezvous: str,
    device: str,
    timeout_seconds: float = 1800.0,
    sizes: Sequence[int] | None = None,
) -> Iterator[World]:
    """The process group of all ranks, or of this rank's group: NCCL on CUDA, gloo on the CPU.

    Args:
        sizes: of groups that each are a world of their own; by default all ranks are one.
        rendezvous: a ``torch.distributed`` init method, such as ``file:///...``, or
            ``launcher://`` for the launcher's exchange.
    """
    with ExitStack() as stack:
        if device == "cpu":
            from llmscale.parallel.cuda_on_cpu import cuda_on_cpu

            keep_freed_memory()
            torch.set_num_threads(_own_cores(int(os.environ.get("LOCAL_WORLD_SIZE", ranks))))
            stack.enter_context(cuda_on_cpu())
        else:
            torch.cuda.set_device(
                int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count()
            )
        timeout = timedelta(seconds=timeout_seconds)
        store, _, _ = next(dist.rendezvous(rendezvous, rank, ranks, timeout=timeout))
        store.set_timeout(timeout)
        seat = Seat.of(rank, sizes or [ranks])
        dist.init_process_group(
            "gloo" if device == "cpu" else "nccl",
            store=dist.PrefixStore(f"group {seat.group}", store),
            rank=seat.rank,
            world_size=seat.ranks,
            timeout=timeout,
        )
        stack.callback(dist.destroy_process_group)
        where = torch.device("cpu") if device == "cpu" else torch.device("cuda")
        bridges = _bridges(seat, sizes or [ranks], store, device)
        yield World(seat.rank, seat.ranks, where, seat.group, bridges)


def _bridges(seat: Seat, sizes: Sequence[int], store: dist.Store, device: str) -> dict[int, Bridge]:
    """Those of a rank, made in the order of the groups."""

    def bridge(group: int, number: int) -> Bridge:
        meeting = dist.PrefixStore(f"bridge {group}", store)
        return Bridge(meeting, number, sizes[group] + 1, device)

    if seat.group > 0:
        return {seat.group: bridge(seat.group, seat.rank + 1)}
    return {group: bridge(group, 0) for group in range(1, len(sizes))} if seat.rank == 0 else {}


def _own_cores(ranks_here: int) -> int:
    """This rank's share of the node's cores, or fewer if it was given fewer."""
    share = max(1, (os.cpu_count() or 1) // ranks_here)
    given = int(os.environ.get(CORES_VARIABLE) or os.environ.get("SLURM_CPUS_PER_TASK") or share)
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else share
    return min(share, given, bound)


@contextmanager
def imagined_world(rank: int, ranks: int) -> Iterator[None]:
    """One rank of a world that is not there: groups of any size, no communication, no memory.

    Models are built on the meta device within it. Groups without this rank, tens of thousands
    in a large world, are not made.
    """
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from llmscale.parallel.cuda_on_cpu import cuda_on_cpu

    create_group = parallel_state.create_group

    def create_own_group(ranks: Sequence[int], *arguments: Any, **options: Any) -> Any:
        return create_group(ranks, *arguments, **options) if rank in ranks else None

    with (
        cuda_on_cpu(torch.device("meta")),
        patch.object(parallel_state, "create_group", create_own_group),
    ):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        try:
            yield
        finally:
            dist.destroy_process_group()


def place_in_layout() -> dict[str, int]:
    """This rank's number along each dimension of the layout whose groups are there."""
    from megatron.core import parallel_state

    return {
        "tensor": parallel_state.get_tensor_model_parallel_rank(),
        "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
        "context": parallel_state.get_context_parallel_rank(),
        "expert": parallel_state.get_expert_model_parallel_rank(),
        "data": parallel_state.get_data_parallel_rank(),
    }


@contextmanager
def process_groups(layout: Layout, seed: int) -> Iterator[None]:
    """megatron-core's groups for a layout, and its random states, destroyed at the end."""
    from megatron.core import parallel_state, tensor_parallel

    create_group, created = parallel_state.create_group, []

    def create_and_keep(*arguments: Any, **options: Any) -> Any:
        created.append(create_group(*arguments, **options))
        return created[-1]

    with patch.object(parallel_state, "create_group", create_and_keep):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=(
                layout.virtual_pipeline if layout.virtual_pipeline > 1 else None
            ),
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        for group in created:
            if isinstance(group, dist.ProcessGroup):
                dist.destroy_process_group(group)  # megatron-core leaves them, with threads
