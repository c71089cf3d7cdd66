"""A stage's checkpoints at a URL: uploaded file by file, there for readers once COMPLETE is.

COMPLETE goes up last and is taken away first, so one that is there vouches for all files.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmscale.artifacts import COMPLETE, checksum, mark_complete
from llmscale.mirror import CHECKPOINTS, Mirror

DAMAGED = "DAMAGED"
"""What the COMPLETE of a checkpoint becomes whose checksums do not hold."""


class StoredCheckpoints:
    """The checkpoints of one stage, at the URL of its run.

    Every method raises a StageError where the storage cannot be reached, or refuses.
    """

    def __init__(self, mirror: Mirror, stage: str) -> None:
        self._mirror, self._storage, self._stage = mirror, mirror.storage, stage

    def place(self, step: int) -> str:
        """The URL of a step's checkpoint."""
        return f"{self._storage.url}/{self._folder(step)}"

    def steps(self) -> list[int]:
        """The steps that have a COMPLETE, ascending."""
        return sorted(step for step, names in self._found().items() if COMPLETE in names)

    def clear(self, step: int) -> None:
        """Makes room for a step's checkpoint: what an interrupted upload left is removed."""
        folder = self._folder(step)
        self._storage.remove([f"{folder}/{COMPLETE}"])
        self._mirror.clear(folder)

    def upload(self, step: int, folder: Path, files: Iterable[Path]) -> None:
        """Sends files of a checkpoint's folder, which stay unseen until it is sealed."""
        for file in files:
            name = file.relative_to(folder).as_posix()
            self._storage.upload({f"{self._folder(step)}/{name}": file})

    def seal(self, step: int, complete: Path) -> None:
        """Makes an uploaded checkpoint count, after the log of the steps up to it."""
        self._mirror.push(f"{self._stage}/metrics.jsonl", f"{self._stage}/tensorboard")
        self._storage.upload({f"{self._folder(step)}/{COMPLETE}": complete})

    def prune(self, kept: set[int]) -> None:
        """Removes all checkpoints but some, and what interrupted uploads left."""
        for step, names in self._found().items():
            if step not in kept and DAMAGED not in names:
                self.clear(step)

    def read(self, step: int, name: str) -> Any:
        """What a JSON file of a checkpoint holds; None where there is none."""
        content = self._storage.read(f"{self._folder(step)}/{name}")
        return None if content is None else json.loads(content)

    def fetch(self, step: int, target: Path) -> str | None:
        """Makes a folder here the checkpoint of a step; what is here and holds is not fetched.

        Returns:
            what is wrong with the checkpoint; None if nothing is.
        """
        try:
            checksums = self.read(step, COMPLETE)
        except ValueError:
            return f"{COMPLETE} cannot be read"
        if checksums is None:
            return f"it has no {COMPLETE}: its writing was cut off"
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in checksums):
            return f"{COMPLETE} names a file outside of it"
        target.mkdir(parents=True, exist_ok=True)
        (target / COMPLETE).unlink(missing_ok=True)
        for name, expected in checksums.items():
            file = target / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_file() and checksum(file) == expected:
                continue
            try:
                self._storage.download({f"{self._folder(step)}/{name}": file})
            except FileNotFoundError:
                return f"{name} is missing"
            if checksum(file) != expected:
                return f"the checksum of {name} does not hold"
        mark_complete(target, checksums)
        return None

    def put_away(self, step: int) -> None:
        """Keeps a damaged checkpoint to look at, where it counts no more."""
        complete = f"{self._folder(step)}/{COMPLETE}"
        self._storage.copy({complete: f"{self._folder(step)}/{DAMAGED}"})
        self._storage.remove([complete])

    def _folder(self, step: int) -> str:
        return f"{self._stage}/{CHECKPOINTS}/step-{step:08d}"

    def _found(self) -> dict[int, set[str]]:
        """What is there of each step, whole or not."""
        found: dict[int, set[str]] = {}
        for name in self._storage.versions(f"{self._stage}/{CHECKPOINTS}"):
            step, _, file = name.rpartition("step-")[2].partition("/")
            if step.isdigit():
                found.setdefault(int(step), set()).add(file)
        return found


def stored_checkpoints(stage: Path) -> StoredCheckpoints | None:
    """Those of a stage's folder, if its run is at a URL."""
    mirror = Mirror.of(stage.parent)
    return None if mirror is None else StoredCheckpoints(mirror, stage.name)
