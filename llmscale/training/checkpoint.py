"""Checkpoints: sharded, loadable at any other layout, whole or not there at all.

A checkpoint is written beside its place by all ranks, sealed by ``COMPLETE`` with every
file's checksum, and renamed. Loading takes the newest one whose checksums hold. Where the run
is at a URL (stored.py), its storage has the checkpoints, and each node a cache of them: a rank
uploads what it wrote, and the first rank of each node fetches what the node lacks.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llmscale.artifacts import (
    COMPLETE,
    checksum,
    damage,
    mark_complete,
    publish_folder,
    read_json,
    write_json,
)
from llmscale.errors import StageError
from llmscale.stored import StoredCheckpoints, stored_checkpoints
from llmscale.training.engine import Stateful, Writing

STATE = "state.json"


@dataclass(frozen=True)
class TrainingState:
    """Where training stands: what of the run's state is not a tensor."""

    step: int = 0
    consumed_samples: int = 0
    tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    worse_validations: int = 0
    kl_coefficient: float | None = None


class _Saving:
    """A checkpoint on its way: its local files being written, not yet sealed."""

    def __init__(
        self,
        writing: Writing,
        beside: Path,
        target: Path,
        state: TrainingState,
        upload: Callable[[], None],
    ) -> None:
        self.beside, self.target, self.state = beside, target, state
        self._writing = writing
        self._pool = ThreadPoolExecutor(1)
        self._written = self._pool.submit(self._write, upload)

    def _write(self, upload: Callable[[], None]) -> None:
        self._writing.write()
        upload()

    def checksums(self) -> dict[str, str]:
        """Of what this rank has written and what was written for it, by names in the checkpoint."""
        own = _checksums(self._writing.files(), self.beside)
        return {**own, **self._writing.elsewhere()}

    def written(self) -> bool:
        """Whether every rank has written its files; collective."""
        flag = torch.tensor([float(self._written.done())], device=_collective_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag.item())

    def finish(self) -> None:
        """Waits for this rank's files and writes the shared metadata; collective."""
        self._written.result()
        self._pool.shutdown()
        self._writing.finish()


def first_of_folder(stage: Path) -> bool:
    """Whether this rank is the first of those that see this very folder of a stage.

    Where a run is at a URL, each node has one of its own.
    """
    if stored_checkpoints(stage) is None:
        return dist.get_rank() == 0
    return int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _checksums(files: Iterable[Path], folder: Path) -> dict[str, str]:
    return {_name(file, folder): checksum(file) for file in files}


def _step(folder: Path) -> int:
    """Of a checkpoint's folder, also while it is being written."""
    return int(folder.name.removeprefix(".").removesuffix(".partial").removeprefix("step-"))


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
        return sorted(_step(path) for path in self._folder.glob("step-*"))

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

    def save(self, engine: Stateful, state: TrainingState) -> None:
        """Writes a checkpoint; afterwards prunes all but the newest ``keep`` and the best."""
        self.begin(engine, state)
        self.finish()

    def begin(self, engine: Stateful, state: TrainingState) -> None:
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
        writing = engine.writing(beside)

        def upload() -> None:
            if self._stored is not None:
                self._stored.upload(state.step, beside, writing.files())

        self._saving = _Saving(writing, beside, target, state, upload)

    def poll(self) -> None:
        """Seals a checkpoint that was begun, if all its files are written."""
        if self._saving is not None and self._saving.written():
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint that was begun, if any, and seals it."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.finish()
            self._seal(saving.beside, saving.target, saving.state, saving.checksums())

    def _seal(self, beside: Path, target: Path, state: TrainingState, own: dict[str, str]) -> None:
        if dist.get_rank() == 0:
            write_json(beside / STATE, asdict(state))
        checksums = self._all_checksums(beside, beside, own)
        if dist.get_rank() == 0:
            mark_complete(beside, checksums)
            if self._stored is not None:
                self._stored.seal(state.step, beside / COMPLETE)
        dist.barrier()
        if self._first_here:
            publish_folder(beside, target)
        self._prune(state)

    def _all_checksums(self, beside: Path, part: Path, own: dict[str, str]) -> dict[str, str]:
        """Of all files of a part of a checkpoint, on every rank; what ranks have in common, stored.

        Args:
            own: of this rank's files, by names in the checkpoint.
        """
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        known = {name: value for each in everyone for name, value in each.items()}
        found = [known]
        if dist.get_rank() == 0:
            files = sorted(path for path in part.rglob("*") if path.is_file())
            rest = [path for path in files if _name(path, beside) not in known]
            found = [known | _checksums(rest, beside)]
            if self._stored is not None:
                self._stored.upload(_step(beside), beside, rest)
        dist.broadcast_object_list(found)
        return found[0]

    def add(self, engine: Stateful, part: Path) -> dict[str, str]:
        """Writes a part of a checkpoint that the ranks of another world have begun, and seal.

        Returns:
            the checksums of its files, by their names in the checkpoint.
        """
        if self._first_here:
            part.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        writing = engine.writing(part)
        writing.write()
        files = writing.files()
        if self._stored is not None:
            self._stored.upload(_step(part.parent), part.parent, files)
        dist.barrier()
        writing.finish()
        found = self._all_checksums(part.parent, part, _checksums(files, part.parent))
        if self._stored is not None and self._first_here:
            shutil.rmtree(part)
        return found

    def load_part(self, engine: Stateful, part: Path) -> None:
        """Restores what ``add`` wrote.

        Raises:
            StageError: if it cannot be fetched.
        """
        if self._stored is not None and not self.whole(_step(part.parent)):
            raise StageError(f"{part.parent}: cannot be fetched")
        engine.load(part)

    def _prune(self, state: TrainingState) -> None:
        kept: list[set[int]] = [set()]
        if dist.get_rank() == 0:
            kept = [self._kept(state)]
            if self._stored is not None:
                self._stored.prune(kept[0])
        dist.broadcast_object_list(kept)
        if self._first_here:
            for path in self._folder.glob("step-*"):
                if _step(path) not in kept[0]:
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

    def load(self, engine: Stateful, step: int) -> TrainingState:
        """Restores weights, optimizer and, at the same number of ranks, random states."""
        path = self.path(step)
        engine.load(path)
        return TrainingState(**read_json(path / STATE))
