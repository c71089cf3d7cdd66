"""The state of a DeepSpeed engine as safetensors: loadable at any number of ranks and ZeRO stage.

Each rank writes the pieces it holds, by name and place; nothing is gathered, nothing pickled.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param as local_weight
from deepspeed.utils import safe_get_local_optimizer_state as local_moment
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmscale.artifacts import read_json, sync_file, write_json
from llmscale.errors import StageError
from llmscale.training.engine import Writing

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
RANDOM = "random"
ABOUT = "deepspeed.json"


class Zeroed(Protocol):
    """What of an engine has state."""

    @property
    def stage(self) -> int: ...
    @property
    def optimizer(self) -> Any: ...
    @property
    def trainable(self) -> dict[str, nn.Parameter]: ...

    def gathered(
        self, parameters: Sequence[nn.Parameter], changed_by: int | None = None
    ) -> AbstractContextManager[None]: ...


def _adam_tensors(engine: Zeroed) -> list[Tensor]:
    """The tensors PyTorch's AdamW updates on this rank: flat partitions under ZeRO."""
    if engine.stage == 0:
        return list(engine.trainable.values())
    if engine.stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return list(engine.optimizer.single_partition_of_fp32_groups)


def _adam_state(engine: Zeroed) -> Any:
    return engine.optimizer.state


def prepare_moments(engine: Zeroed) -> None:
    """Makes AdamW's state as its first step would, so that it can be read and set before."""
    state = _adam_state(engine)
    for tensor in _adam_tensors(engine):
        if not state[tensor]:
            state[tensor]["step"] = torch.tensor(0.0)
            state[tensor].update({moment: torch.zeros_like(tensor) for moment in MOMENTS})
    if engine.stage in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


@dataclass(frozen=True)
class Piece:
    """What this rank keeps of a parameter: a range of its flattened elements."""

    start: int
    tensors: dict[str, Tensor]
    """The fp32 weight and both moments; writing into them changes the optimizer."""

    @property
    def elements(self) -> int:
        """How many elements the range has."""
        return self.tensors[WEIGHT].numel()


def held_piece(engine: Zeroed, parameter: nn.Parameter) -> Piece | None:
    """This rank's piece of a parameter, without padding; None if it has none.

    Under ZeRO 0 every rank holds the whole.
    """
    if engine.stage == 0:
        state = _adam_state(engine)[parameter]
        moments = {moment: state[moment] for moment in MOMENTS}
        return _cut({WEIGHT: parameter.detach(), **moments}, 0, 0, parameter.numel())
    if engine.stage == 3:
        return _partitioned_piece(parameter)
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    moments = {moment: mapping.get_hp_fragment(moment) for moment in MOMENTS}
    tensors = {WEIGHT: mapping.get_hp_fragment(), **moments}
    return Piece(mapping.lp_fragment_address.start, tensors)


def _partitioned_piece(parameter: Any) -> Piece | None:
    held = {WEIGHT: local_weight(parameter)}
    held |= {moment: local_moment(parameter, moment) for moment in MOMENTS}
    share = parameter.ds_tensor.numel()
    start = dist.get_rank() * share
    return _cut(held, start, 0, min(share, parameter.ds_numel - start))


def saved_piece(engine: Zeroed, parameter: nn.Parameter) -> Piece | None:
    """What this rank writes of a parameter: of what all ranks hold, an even share."""
    piece = held_piece(engine, parameter)
    if piece is None or engine.stage > 0:
        return piece
    share = -(-piece.elements // dist.get_world_size())
    start = dist.get_rank() * share
    return _cut(piece.tensors, start, start, min(share, piece.elements - start))


def _cut(held: dict[str, Tensor], start: int, at: int, elements: int) -> Piece | None:
    """The piece that begins at ``start`` in the parameter and at ``at`` in what is held."""
    if elements <= 0:
        return None
    parts = {kind: tensor.view(-1)[at : at + elements] for kind, tensor in held.items()}
    return Piece(start, parts)


@dataclass(frozen=True)
class About:
    """What of the state is not a tensor."""

    ranks: int
    adam_steps: int
    shapes: dict[str, list[int]]


class DeepSpeedWriting(Writing):
    """A copy of this rank's pieces, on its way into a folder."""

    def __init__(self, engine: Zeroed, folder: Path) -> None:
        self._folder, self._about = folder, _about(engine)
        self._tensors = {RANDOM: torch.get_rng_state()}
        for name, parameter in engine.trainable.items():
            piece = saved_piece(engine, parameter)
            if piece is not None:
                for kind, tensor in piece.tensors.items():
                    self._tensors[f"{kind} {piece.start} {name}"] = tensor.cpu().clone()

    def write(self) -> None:
        """Writes this rank's file; may be called in a thread."""
        save_file(self._tensors, _file(self._folder, dist.get_rank()))
        sync_file(_file(self._folder, dist.get_rank()))

    def files(self) -> list[Path]:
        """What this rank has written."""
        return [_file(self._folder, dist.get_rank())]

    def finish(self) -> None:
        """Writes what all files have in common."""
        if dist.get_rank() == 0:
            write_json(self._folder / ABOUT, asdict(self._about))


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.safetensors"


def _about(engine: Zeroed) -> About:
    shapes = {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.trainable.items()
    }
    steps = _adam_state(engine)[_adam_tensors(engine)[0]]["step"]
    return About(dist.get_world_size(), int(steps), shapes)


class SavedState:
    """A saved state: any range of any parameter, whatever pieces it was saved in."""

    def __init__(self, folder: Path) -> None:
        self.about = About(**read_json(folder / ABOUT))
        self._files = [
            safe_open(_file(folder, rank), framework="pt") for rank in range(self.about.ranks)
        ]
        self._pieces: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        for file in self._files:
            for key in file.keys():  # noqa: SIM118  (the file is no dict)
                if key != RANDOM:
                    kind, start, name = key.split(" ", 2)
                    slices = self._pieces.setdefault((kind, name), [])
                    slices.append((int(start), file.get_slice(key)))

    def random_state(self, rank: int) -> Tensor:
        """The random state of a rank."""
        return self._files[rank].get_tensor(RANDOM)

    def whole(self, kind: str, name: str) -> Tensor:
        """A parameter's weight or moment in its shape."""
        shape = self.about.shapes[name]
        return self.range(kind, name, 0, math.prod(shape)).view(shape)

    def range(self, kind: str, name: str, start: int, elements: int) -> Tensor:
        """Some of the flattened elements of a parameter's weight or moment.

        Raises:
            ValueError: if the pieces do not cover the range.
        """
        result, found = torch.empty(elements), 0
        for place, saved in self._pieces.get((kind, name), []):
            first = max(start, place)
            last = min(start + elements, place + saved.get_shape()[0])
            if first < last:
                result[first - start : last - start] = saved[first - place : last - place]
                found += last - first
        if found != elements:
            raise ValueError(f"{kind} of {name}: {found} of {elements} elements were saved")
        return result


@torch.no_grad()
def load_state(engine: Zeroed, folder: Path) -> None:
    """Restores weights and optimizer and, at the same number of ranks, random states.

    Raises:
        StageError: if another engine wrote the folder.
    """
    if not (folder / ABOUT).exists():
        raise StageError(f"{folder}: was not written by engine deepspeed; use the one it was")
    saved = SavedState(folder)
    for name, parameter in engine.trainable.items():
        _set_weight(engine, parameter, name, saved)
        piece = held_piece(engine, parameter)
        if piece is not None:
            for kind, tensor in piece.tensors.items():
                tensor.copy_(saved.range(kind, name, piece.start, piece.elements))
    for tensor in _adam_tensors(engine):
        _adam_state(engine)[tensor]["step"].fill_(saved.about.adam_steps)
    if saved.about.ranks == dist.get_world_size():
        torch.set_rng_state(saved.random_state(dist.get_rank()))


@torch.no_grad()
def load_weights(engine: Zeroed, folder: Path) -> None:
    """Sets what the forward pass computes with alone; training cannot go on from there."""
    saved = SavedState(folder)
    for name, parameter in engine.trainable.items():
        _set_weight(engine, parameter, name, saved)


def _set_weight(engine: Zeroed, parameter: nn.Parameter, name: str, saved: SavedState) -> None:
    """Under ZeRO 3 rank 0 reads the weight and sends it."""
    with engine.gathered([parameter], changed_by=0):
        if engine.stage < 3 or dist.get_rank() == 0:
            parameter.data.copy_(saved.whole(WEIGHT, name))
