"""The state of a Megatron engine: sharded by megatron-core, loadable at any other layout."""

import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as strategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from llmscale.errors import StageError
from llmscale.models.megatron import LOW_RANK, inner_model
from llmscale.training.adam_state import separate_step_counts
from llmscale.training.engine import Writing
from llmscale.training.megatron_adapter import adapter_state, set_adapter
from llmscale.training.settings import Adapter

OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}


class Sharded(Protocol):
    """What of an engine has state."""

    @property
    def chunks(self) -> list[Any]: ...
    @property
    def optimizer(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def adapter(self) -> Adapter | None: ...


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


class MegatronWriting(Writing):
    """A copy of an engine's state, planned, on its way into a folder; made by all ranks."""

    def __init__(self, engine: Sharded, folder: Path) -> None:
        self._folder = folder
        with patch.object(strategy, "FileSystemWriterAsync", _ThreadedWriter):
            self._request = dist_checkpointing.save(
                sharded_state(engine),
                str(folder),
                sharded_strategy=strategy.TorchDistSaveShardedStrategy(
                    "torch_dist", 1, thread_count=1
                ),
                validate_access_integrity=False,
                async_sharded_save=True,
            )

    def write(self) -> None:
        """Writes this rank's files; may be called in a thread."""
        self._request.async_fn(*self._request.async_fn_args)

    def files(self) -> list[Path]:
        """What this rank has written."""
        return sorted(self._folder.glob(f"__{dist.get_rank()}_*"))

    def finish(self) -> None:
        """Writes what the files have in common, after all are written; collective."""
        for finalize in self._request.finalize_fns:
            finalize()


def load_state(engine: Sharded, folder: Path) -> None:
    """Restores weights, optimizer and, at the same number of ranks, random states; collective.

    Raises:
        StageError: if another engine wrote the folder.
    """
    if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        raise StageError(f"{folder}: was not written by engine megatron; use the one it was")
    state = sharded_state(engine, loading=True)
    keys = dist_checkpointing.load_tensors_metadata(str(folder))
    if _random_key(engine) not in keys:
        state.pop("random")
    loaded = dist_checkpointing.load(state, str(folder))
    set_trained(engine, loaded)
    engine.optimizer.load_state_dict(loaded["optimizer"])
    separate_step_counts(engine.optimizer)
    if "random" in loaded:
        _set_random_states(engine, loaded["random"])


def load_weights(engine: Sharded, folder: Path) -> None:
    """Sets the weights alone, of a model with an adapter those of the adapter; collective."""
    set_trained(engine, dist_checkpointing.load(trained_state(engine), str(folder)))


def load_model(engine: Sharded, folder: Path) -> None:
    """Sets the weights of the model itself from what ``model_state`` left; collective."""
    _set_model(engine, dist_checkpointing.load(model_state(engine), str(folder)))


def trained_state(engine: Sharded) -> dict[str, Any]:
    """What is trained as sharded tensors: the adapter if there is one, else the model."""
    if engine.adapter is not None:
        return {"adapter": adapter_state(engine.chunks)}
    return model_state(engine)


def set_trained(engine: Sharded, loaded: dict[str, Any]) -> None:
    """Puts loaded tensors into the model; the counterpart of ``trained_state``."""
    if engine.adapter is not None:
        set_adapter(engine.chunks, loaded["adapter"])
    else:
        _set_model(engine, loaded)


def model_state(engine: Sharded) -> dict[str, Any]:
    """The weights as sharded tensors whose keys and offsets do not depend on the layout."""
    metadata = {"dp_cp_group": _data_group()}
    return {
        f"model{number}": {
            key: value
            for key, value in inner_model(chunk).sharded_state_dict(metadata=metadata).items()
            if f".{LOW_RANK}." not in key
        }
        for number, chunk in enumerate(engine.chunks)
    }


def _set_model(engine: Sharded, loaded: dict[str, Any]) -> None:
    for number, chunk in enumerate(engine.chunks):
        model = inner_model(chunk)
        model.load_state_dict(loaded[f"model{number}"], strict=engine.adapter is None)


def sharded_state(engine: Sharded, loading: bool = False) -> dict[str, Any]:
    """Everything that resumes a run, as megatron-core's sharded state."""
    _count_padding(engine)
    state = trained_state(engine)
    state["optimizer"] = engine.optimizer.sharded_state_dict(
        dict(state), is_loading=loading, metadata=OPTIMIZER_METADATA
    )
    states = _random_states(engine)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    state["random"] = ShardedTensor.from_rank_offsets(_random_key(engine), states, (0, rank, ranks))
    return state


def _count_padding(engine: Sharded) -> None:
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


def _random_key(engine: Sharded) -> str:
    return f"random_states_of_{dist.get_world_size()}_{engine.device.type}_ranks"


def _tracker_states() -> dict[str, torch.Tensor]:
    return tensor_parallel.get_cuda_rng_tracker().get_states()


def _device_state(engine: Sharded) -> torch.Tensor:
    return torch.cuda.get_rng_state() if engine.device.type == "cuda" else torch.get_rng_state()


def _random_states(engine: Sharded) -> torch.Tensor:
    """The CPU generator, the device's, and megatron-core's tracked: ``[1, states, bytes]``."""
    tracked = [state for _, state in sorted(_tracker_states().items())]
    parts = [torch.get_rng_state(), _device_state(engine), *tracked]
    width = max(part.numel() for part in parts)
    rows = [torch.nn.functional.pad(part.cpu(), (0, width - part.numel())) for part in parts]
    return torch.stack(rows).unsqueeze(0)


def _set_random_states(engine: Sharded, states: torch.Tensor) -> None:
    parts = list(states[0])
    torch.set_rng_state(parts[0][: torch.get_rng_state().numel()].clone())
    if engine.device.type == "cuda":
        torch.cuda.set_rng_state(parts[1][: _device_state(engine).numel()].clone())
    tracked = {
        name: part[: old.numel()].clone()
        for (name, old), part in zip(sorted(_tracker_states().items()), parts[2:], strict=True)
    }
    tensor_parallel.get_cuda_rng_tracker().set_states(tracked)
