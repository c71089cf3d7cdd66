"""Checkpoints: sharded, loadable at any other layout, whole or not there at all.

A checkpoint is written beside its place by all ranks, sealed by ``COMPLETE`` with every
file's checksum, and renamed. Loading takes the newest one whose checksums hold. Where the run
is at a URL (stored.py), its storage has the checkpoints, and each node a cache of them: a rank
uploads what it wrote, and the first rank of each node fetches what the node lacks.
"""

import os
import queue
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as strategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from llmscale.artifacts import (
    COMPLETE,
    checksum,
    damage,
    mark_complete,
    publish_folder,
    read_json,
    write_json,
)
from llmscale.models.megatron import inner_model
from llmscale.stored import StoredCheckpoints, stored_checkpoints
from llmscale.training.adam_state import separate_step_counts
from llmscale.training.megatron_engine import MegatronEngine

STATE = "state.json"
OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True)
class TrainingState:
    """Where training stands: what of the run's state is not a tensor."""

    step: int = 0
    consumed_samples: int = 0
    tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None


class _ThreadedWriter(FileSystemWriterAsync):
    """megatron-core's checkpoint writer without the processes it starts for every file.

    Starting a manager and a writer by process costs seconds a rank; a thread costs nothing,
    since writing holds no lock of Python's.
    """

    write_buckets: list[Any]

    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        with patch.object(filesystem_async, "_get_write_results_queue", queue.SimpleQueue):
            super().prepare_write_data(plan, planner)
        self.write_buckets = [
            (path, name, (objects, [(item, tensor.cpu().clone()) for item, tensor in tensors]))
            for path, name, (objects, tensors) in self.write_buckets
        ]

    def get_save_function_and_args(self) -> tuple[Callable[[], None], None, list[Any]]:
        return self._write, None, []

    def _write(self) -> None:
        """Leaves each bucket's results, or the error, where megatron-core's ``finish`` looks."""
        transforms = [self.transforms] if hasattr(self, "transforms") else []
        results: dict[int, Any] = {}
        for number, bucket in enumerate(self.write_buckets):
            done: queue.SimpleQueue[Any] = queue.SimpleQueue()
            count: queue.Queue[int] = queue.Queue()
            count.put(number)
            self.write_preloaded_data(transforms, number, bucket, done, count, use_fsync=True)
            _, results[number] = done.get()
        if self.results_queue is not None:
            failed = next((r for r in results.values() if isinstance(r, Exception)), None)
            self.results_queue.put(failed or results)


class _Saving:
    """A checkpoint on its way: planned, its local files being written, not yet sealed."""

    def __init__(
        self,
        request: Any,
        beside: Path,
        target: Path,
        state: TrainingState,
        upload: Callable[[], None],
    ) -> None:
        self.beside, self.target, self.state = beside, target, state
        self._request = request
        self._pool = ThreadPoolExecutor(1)
        self._writing = self._pool.submit(self._write, upload)

    def _write(self, upload: Callable[[], None]) -> None:
        self._request.async_fn(*self._request.async_fn_args)
        upload()

    def written(self) -> bool:
        """Whether every rank has written its files; collective."""
        flag = torch.tensor([float(self._writing.done())], device=_collective_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag.item())

    def finish(self) -> None:
        """Waits for this rank's files and writes the shared metadata; collective."""
        self._writing.result()
        self._pool.shutdown()
        for finalize in self._request.finalize_fns:
            finalize()


def _own_files(folder: Path, rank: int) -> list[Path]:
    """What a rank wrote of a checkpoint."""
    return sorted(folder.glob(f"__{rank}_*"))


def first_of_folder(stage: Path) -> bool:
    """Whether this rank is the first of those that see this very folder of a stage.

    Where a run is at a URL, each node has one of its own.
    """
    if stored_checkpoints(stage) is None:
        return dist.get_rank() == 0
    return int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0


def _collective_device() -> str:
    return "cpu" if dist.get_backend() == "gloo" else "cuda"


class Checkpoints:
    """The checkpoints of one stage. Every method is collective unless it says otherwise."""

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None] = print) -> None:
        self._folder = folder
        self._stored: StoredCheckpoints | None = stored_checkpoints(folder.parent)
        self._first_here = first_of_folder(folder.parent)
        self._keep = keep
        self._say = say
        self._saving: _Saving | None = None

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self._folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending; not collective."""
        if self._stored is not None:
            return self._stored.steps()
        return sorted(int(path.name.removeprefix("step-")) for path in self._folder.glob("step-*"))

    def newest_whole(self) -> int | None:
        """The newest step whose checksums hold; a damaged one is named and passed over."""
        known = [self.steps() if dist.get_rank() == 0 else []]
        dist.broadcast_object_list(known)
        for step in reversed(known[0]):
            if self.whole(step, "; using the one before"):
                return step
            if dist.get_rank() == 0:
                self._put_away(step)
        return None

    def whole(self, step: int, then: str = "") -> bool:
        """Whether a checkpoint is there and its checksums hold, on every node; else says why not.

        Args:
            then: said after that.
        """
        own: str | None = None
        if self._first_here:
            path = self.path(step)
            own = damage(path) if self._stored is None else self._stored.fetch(step, path)
        everyone: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        wrong = next((found for found in everyone if found is not None), None)
        if wrong is not None and dist.get_rank() == 0:
            place = self.path(step) if self._stored is None else self._stored.place(step)
            self._say(f"{place}: {wrong}{then}")
        return wrong is None

    def _put_away(self, step: int) -> None:
        """Keeps a damaged checkpoint to look at, out of the way of those that count."""
        if self._stored is not None:
            self._stored.put_away(step)
            return
        away = self._folder / f"damaged-{step:08d}"
        shutil.rmtree(away, ignore_errors=True)
        self.path(step).rename(away)

    def save(self, engine: MegatronEngine, state: TrainingState) -> None:
        """Writes a checkpoint; afterwards prunes all but the newest ``keep`` and the best."""
        self.begin(engine, state)
        self.finish()

    def begin(self, engine: MegatronEngine, state: TrainingState) -> None:
        """Takes a copy of the state and starts writing it in the background."""
        self.finish()
        target = self.path(state.step)
        beside = target.with_name(f".{target.name}.partial")
        if self._first_here:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        if self._stored is not None and dist.get_rank() == 0:
            self._stored.clear(state.step)
        dist.barrier()
        with patch.object(strategy, "FileSystemWriterAsync", _ThreadedWriter):
            request = dist_checkpointing.save(
                sharded_state(engine),
                str(beside),
                sharded_strategy=strategy.TorchDistSaveShardedStrategy(
                    "torch_dist", 1, thread_count=1
                ),
                validate_access_integrity=False,
                async_sharded_save=True,
            )
        rank = dist.get_rank()

        def upload() -> None:
            if self._stored is not None:
                self._stored.upload(state.step, _own_files(beside, rank))

        self._saving = _Saving(request, beside, target, state, upload)

    def poll(self) -> None:
        """Seals a checkpoint that was begun, if all its files are written."""
        if self._saving is not None and self._saving.written():
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint that was begun, if any, and seals it."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.finish()
            self._seal(saving.beside, saving.target, saving.state)

    def _seal(self, beside: Path, target: Path, state: TrainingState) -> None:
        rank = dist.get_rank()
        own = {path.name: checksum(path) for path in _own_files(beside, rank)}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        if rank == 0:
            write_json(beside / STATE, asdict(state))
            checksums = {name: value for part in everyone for name, value in part.items()}
            rest = sorted(path for path in beside.iterdir() if path.name not in checksums)
            checksums.update({path.name: checksum(path) for path in rest})
            mark_complete(beside, checksums)
            if self._stored is not None:
                self._stored.upload(state.step, rest)
                self._stored.seal(state.step, beside / COMPLETE)
        dist.barrier()
        if self._first_here:
            publish_folder(beside, target)
        self._prune(state)

    def _prune(self, state: TrainingState) -> None:
        kept: list[set[int]] = [set()]
        if dist.get_rank() == 0:
            kept = [self._kept(state)]
            if self._stored is not None:
                self._stored.prune(kept[0])
        dist.broadcast_object_list(kept)
        if self._first_here:
            for path in self._folder.glob("step-*"):
                if int(path.name.removeprefix("step-")) not in kept[0]:
                    shutil.rmtree(path)
        dist.barrier()

    def _kept(self, state: TrainingState) -> set[int]:
        """The newest steps that are to stay, and the best as they and the run know it."""
        newest = self.steps()[-self._keep :]
        best = {(self._read_state(step) or {}).get("best_step") for step in newest}
        return {step for step in (*newest, *best, state.best_step) if step is not None}

    def _read_state(self, step: int) -> Any:
        if self._stored is not None:
            return self._stored.read(step, STATE)
        return read_json(self.path(step) / STATE)

    def load(self, engine: MegatronEngine, step: int) -> TrainingState:
        """Restores weights, optimizer and, at the same number of ranks, random states."""
        path = self.path(step)
        state = sharded_state(engine, loading=True)
        keys = dist_checkpointing.load_tensors_metadata(str(path))
        if _random_key(engine) not in keys:
            state.pop("random")
        loaded = dist_checkpointing.load(state, str(path))
        set_weights(engine, loaded)
        engine.optimizer.load_state_dict(loaded["optimizer"])
        separate_step_counts(engine.optimizer)
        if "random" in loaded:
            _set_random_states(engine, loaded["random"])
        return TrainingState(**read_json(path / STATE))

    def load_weights(self, engine: MegatronEngine, step: int) -> None:
        """Restores the weights alone."""
        set_weights(engine, dist_checkpointing.load(model_state(engine), str(self.path(step))))


def model_state(engine: MegatronEngine) -> dict[str, Any]:
    """The weights as sharded tensors whose keys and offsets do not depend on the layout."""
    return {
        f"model{number}": inner_model(chunk).sharded_state_dict(
            metadata={"dp_cp_group": _data_group()}
        )
        for number, chunk in enumerate(engine.chunks)
    }


def set_weights(engine: MegatronEngine, loaded: dict[str, Any]) -> None:
    """Puts loaded tensors into the model; the counterpart of ``model_state``."""
    for number, chunk in enumerate(engine.chunks):
        inner_model(chunk).load_state_dict(loaded[f"model{number}"])


def sharded_state(engine: MegatronEngine, loading: bool = False) -> dict[str, Any]:
    """Everything that resumes a run, as megatron-core's sharded state."""
    _count_padding(engine)
    state = model_state(engine)
    state["optimizer"] = engine.optimizer.sharded_state_dict(
        dict(state), is_loading=loading, metadata=OPTIMIZER_METADATA
    )
    states = _random_states(engine)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    state["random"] = ShardedTensor.from_rank_offsets(_random_key(engine), states, (0, rank, ranks))
    return state


def _count_padding(engine: MegatronEngine) -> None:
    """Lets the distributed optimizer count the padding between its buckets as state.

    megatron-core 0.16.1 gathers the state without that padding, then cuts parameters out at
    places that count it, so that those behind a padded bucket are saved wrong.
    """
    for chunk in engine.chunks:
        wrapper: Any = chunk
        for buffer in (*wrapper.buffers, *wrapper.expert_parallel_buffers):
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()


def _data_group() -> Any:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _random_key(engine: MegatronEngine) -> str:
    return f"random_states_of_{dist.get_world_size()}_{engine.device.type}_ranks"


def _tracker_states() -> dict[str, torch.Tensor]:
    return tensor_parallel.get_cuda_rng_tracker().get_states()


def _device_state(engine: MegatronEngine) -> torch.Tensor:
    return torch.cuda.get_rng_state() if engine.device.type == "cuda" else torch.get_rng_state()


def _random_states(engine: MegatronEngine) -> torch.Tensor:
    """The CPU generator, the device's, and megatron-core's tracked: ``[1, states, bytes]``."""
    tracked = [state for _, state in sorted(_tracker_states().items())]
    parts = [torch.get_rng_state(), _device_state(engine), *tracked]
    width = max(part.numel() for part in parts)
    rows = [torch.nn.functional.pad(part.cpu(), (0, width - part.numel())) for part in parts]
    return torch.stack(rows).unsqueeze(0)


def _set_random_states(engine: MegatronEngine, states: torch.Tensor) -> None:
    parts = list(states[0])
    torch.set_rng_state(parts[0][: torch.get_rng_state().numel()].clone())
    if engine.device.type == "cuda":
        torch.cuda.set_rng_state(parts[1][: _device_state(engine).numel()].clone())
    tracked = {
        name: part[: old.numel()].clone()
        for (name, old), part in zip(sorted(_tracker_states().items()), parts[2:], strict=True)
    }
    tensor_parallel.get_cuda_rng_tracker().set_states(tracked)
