"""Run folders: manifests, atomic writes and checksums.

Everything here survives a power cut: a file is written beside its place, flushed to the
disk, and renamed, so a reader finds the old content or the new and never a part.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from llmscale.holder import Holder
from llmscale.lease import Lease
from llmscale.lock import FolderLock
from llmscale.mirror import Mirror

MANIFEST = "manifest.json"
COMPLETE = "COMPLETE"
UPLOADED = re.compile(r'(?<![^"])[^"]*/_ray_pkg_[0-9a-f]+/')
"""The way to what a Ray job uploaded, in a path from its beginning: a text's, or a quote."""


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def sync_folder(folder: Path) -> None:
    """Makes renames within a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file atomically.

    Raises:
        OSError: if the disk is full or the folder cannot be written; the old file stays.
    """
    descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(beside).chmod(0o644)
        Path(beside).replace(path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically, for people to read too."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears at ``path`` whole, or not at all; it replaces an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    beside.chmod(0o755)
    try:
        yield beside
        publish_folder(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def publish_folder(beside: Path, path: Path) -> None:
    """Flushes a finished folder and renames it into place, for what stood there before."""
    for file in sorted(beside.rglob("*")):
        if file.is_file():
            sync_file(file)
    sync_folder(beside)
    if path.exists():
        old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
        path.rename(old / path.name)
        beside.rename(path)
        shutil.rmtree(old)
    else:
        beside.rename(path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Flushes a written file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """The SHA-256 of plain data in canonical JSON.

    Paths within what a Ray job uploaded count from there on: each version of it is unpacked
    into a folder of its own.
    """
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(UPLOADED.sub("uploaded:", canonical).encode()).hexdigest()


def version_of(file: Path) -> list[object]:
    """Changes when a file does: by size and time of change, or by content where Ray unpacked it.

    Unpacking sets the time anew.
    """
    about = file.stat()
    if UPLOADED.search(str(file.absolute())):
        return [about.st_size, checksum(file)]
    return [about.st_size, about.st_mtime_ns]


def folder_fingerprint(folder: Path) -> str:
    """Changes when a file of the folder does, by name and version."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return fingerprint([[file.name, *version_of(file)] for file in files])


def remove_leftovers(folder: Path) -> None:
    """Removes what interrupted writes left beside their places; only for the folder's writer."""
    for leftover in folder.glob(".*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def mark_complete(folder: Path, checksums: dict[str, str]) -> None:
    """Writes the last file of a folder: the checksums of all the others, by relative name."""
    write_json(folder / COMPLETE, checksums)


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that ``mark_complete`` sealed; None if nothing is."""
    try:
        checksums = read_json(folder / COMPLETE)
    except ValueError:
        return f"{COMPLETE} cannot be read"
    if checksums is None:
        return f"it has no {COMPLETE}: its writing was cut off"
    for name, expected in checksums.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if checksum(file) != expected:
            return f"the checksum of {name} does not hold"
    return None


class StageFolder:
    """The folder of one stage, by the names docs/commands.md fixes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest_file = path / MANIFEST
        self.metrics_file = path / "metrics.jsonl"
        self.progress_file = path / "progress.json"
        self.logs = path / "logs"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.hf = path / "hf"

    def manifest(self) -> dict[str, Any]:
        """The manifest, or an empty one where the stage has not begun."""
        return read_json(self.manifest_file) or {}

    def update_manifest(self, **entries: Any) -> None:
        """Replaces the given entries of the manifest."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.manifest_file, {**self.manifest(), **entries})

    def add_metrics(self, **metrics: Any) -> None:
        """Adds to the manifest's metrics, the figures a report shows."""
        self.update_manifest(metrics={**self.manifest().get("metrics", {}), **metrics})

    def log_file(self, rank: int) -> Path:
        """Where a rank's output goes."""
        return self.logs / f"rank-{rank:05d}.log"

    def metrics(self) -> list[dict[str, Any]]:
        """The logged steps; a last line that was cut off by a crash is left out."""
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


class RunFolder:
    """A run's folder: its recipe, one folder a stage, and of a sweep one a member."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._locked = False
        self.recipe_file = path / "recipe.yaml"
        self.report_file = path / "report.html"

    def stage(self, name: str) -> StageFolder:
        """The folder of the stage with that name."""
        return StageFolder(self.path / name)

    def member(self, number: str) -> "RunFolder":
        """The run folder of a sweep's member."""
        return RunFolder(self.path / "sweep" / number)

    @cached_property
    def mirror(self) -> Mirror | None:
        """What keeps this folder like the URL the run is at; None of a run that is at a path."""
        return Mirror.of(self.path)

    @property
    def place(self) -> str:
        """Where the run is for its user: the URL, or the path."""
        return str(self.path) if self.mirror is None else self.mirror.url

    @property
    def full_place(self) -> str:
        """The same, from wherever it is asked for: the URL, or the absolute path."""
        return str(self.path.absolute()) if self.mirror is None else self.mirror.url

    def push(self, *scopes: str) -> None:
        """Sends what was written in some files and folders to the URL, if the run is at one."""
        if self.mirror is not None:
            self.mirror.push(*scopes)

    def pull(self, *scopes: str) -> None:
        """Makes some files and folders what they are at the URL, if the run is at one."""
        if self.mirror is not None:
            self.mirror.pull(*scopes)

    def set_aside(self, name: str) -> Path | str:
        """Moves a stage's outdated folder out of the way, keeping it."""
        if self.mirror is not None:
            kept = self.mirror.set_aside(name)
            shutil.rmtree(self.stage(name).path, ignore_errors=True)
            return kept
        superseded = self.path / "superseded"
        superseded.mkdir(exist_ok=True)
        targets = (superseded / f"{name}-{number}" for number in itertools.count(1))
        target = next(target for target in targets if not target.exists())
        self.stage(name).path.rename(target)
        sync_folder(self.path)
        return target

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run folder for one writer, who may ask for it again meanwhile.

        Raises:
            RecipeError: if another process holds it.
            OSError: if it cannot be written.
        """
        if self._locked:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(FolderLock(self.path).held())
            if self.mirror is not None:
                stack.enter_context(Lease(self.mirror.url, _say).held())
            self._locked = True
            try:
                yield
            finally:
                self._locked = False

    def holder(self) -> Holder | None:
        """Who runs in this folder now; None if nobody does."""
        if self.mirror is not None:
            return Lease(self.mirror.url, _say).holder()
        return FolderLock(self.path).holder()


def _say(line: str) -> None:
    print(line, file=sys.stderr)
