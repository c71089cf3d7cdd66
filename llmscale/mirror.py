"""A run folder at a URL: a folder on this machine that is kept like it, both ways.

What the URL holds counts. The folder here is a cache: what it lacks is fetched, and what it has
and the URL lacks is removed. Checkpoints do not move with the rest; stored.py moves them.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llmscale.errors import MachineError, StageError
from llmscale.storage import SECONDS_TO_WAIT, Storage

CHECKPOINTS = "checkpoints"
SUPERSEDED = "superseded"
SECONDS_TO_OPEN = 60.0
TOLD = (
    "manifest.json",
    "metrics.jsonl",
    "progress.json",
    "samples.json",
    "samples.jsonl",
    "validation.jsonl",
    "logs",
)
"""What of a stage is looked at from elsewhere."""
ATTEMPTS = 3
"""At fetching files while others are writing there."""
Stamp = tuple[int, int]
"""A file's size and time of change."""
Synced = dict[str, tuple[Stamp, str]]
"""Of each file that is the same on both sides: its stamp here, its version there."""


class Mirror:
    """What moves between a folder and a URL. Names are relative to both.

    A *scope* is a file's name, or a folder's for all that is in it but checkpoints and names
    that begin with a dot.
    """

    def __init__(self, folder: Path, storage: Storage) -> None:
        self.folder, self.storage = folder, storage
        self.url = storage.url

    @staticmethod
    def of(folder: Path, patience_seconds: float = SECONDS_TO_WAIT) -> "Mirror | None":
        """That of a folder which ``cached`` made; None of any other."""
        try:
            url = (folder / ".mirror").read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        return Mirror(folder, Storage(url, patience_seconds))

    def pull(self, *scopes: str, without: Sequence[str] = ()) -> None:
        """Makes the folder what the URL is, in these scopes.

        Args:
            without: scopes within them that stay as they are.

        Raises:
            StageError: if the storage cannot be reached, or refuses.
        """
        with self._turn() as synced:
            for scope in scopes:
                for attempt in range(1, ATTEMPTS + 1):
                    try:
                        self._pull(scope, without, synced)
                        break
                    except FileNotFoundError:  # removed since it was listed
                        if attempt == ATTEMPTS:
                            raise

    def _pull(self, scope: str, without: Sequence[str], synced: Synced) -> None:
        def counts(name: str) -> bool:
            return _travels(name) and not any(_within(name, left) for left in without)

        there = {n: v for n, v in self.storage.versions(scope).items() if counts(n)}
        here = {name: stamp for name, stamp in self._here(scope).items() if counts(name)}
        same = {name for name in there if synced.get(name) == (here.get(name), there[name])}
        self.storage.download({name: self.folder / name for name in there if name not in same})
        for name in here:
            if name not in there:
                (self.folder / name).unlink()
        for name in [n for n in synced if _within(n, scope) and counts(n)]:
            del synced[name]
        synced |= {name: (_stamp(self.folder / name), there[name]) for name in there}

    def push(self, *scopes: str) -> None:
        """Sends what was written here since the last time; what was removed here goes there, too.

        Raises:
            StageError: if the storage cannot be reached, or refuses.
        """
        with self._turn() as synced:
            for scope in scopes:
                here = self._here(scope)
                changed = [n for n, stamp in here.items() if synced.get(n, (None,))[0] != stamp]
                gone = [n for n in synced if _within(n, scope) and n not in here]
                self.storage.upload({name: self.folder / name for name in changed})
                self.storage.remove(gone)
                for name in gone:
                    del synced[name]
                there = self.storage.versions(scope) if changed else {}
                synced |= {name: (here[name], there[name]) for name in changed if name in there}

    def clear(self, scope: str) -> None:
        """Removes all that the URL holds in a scope."""
        self.storage.remove(list(self.storage.versions(scope)))

    def parts(self, stage: str) -> list[str]:
        """What a stage's folder holds at the URL, by the names right in it."""
        names = {name.split("/")[1] for name in self.storage.versions(stage)}
        return sorted(name for name in names if not name.startswith("."))

    def set_aside(self, stage: str) -> str:
        """Keeps a stage's outdated result out of the way; returns its new place.

        The manifest goes last, after one without a fingerprint has taken its place: cut off at
        any point, the stage is outdated still.
        """
        taken = [re.match(rf"{SUPERSEDED}/{re.escape(stage)}-(\d+)/", n) for n in self._aside()]
        number = max((int(match[1]) for match in taken if match), default=0) + 1
        target, manifest = f"{SUPERSEDED}/{stage}-{number}", f"{stage}/manifest.json"
        names = list(self.storage.versions(stage))
        self.storage.copy({name: target + name.removeprefix(stage) for name in names})
        self.storage.write(manifest, b'{"status": "superseded"}\n')
        self.storage.remove([name for name in names if name != manifest])
        self.storage.remove([manifest])
        return f"{self.url}/{target}"

    def _aside(self) -> list[str]:
        return list(self.storage.versions(SUPERSEDED))

    def _here(self, scope: str) -> dict[str, Stamp]:
        place = self.folder / scope
        files = [place] if place.is_file() else [f for f in place.rglob("*") if f.is_file()]
        names = {file.relative_to(self.folder).as_posix(): file for file in files}
        return {name: _stamp(file) for name, file in names.items() if _travels(name)}

    @contextmanager
    def _turn(self) -> Iterator[Synced]:
        """One process of this machine at a time, with what is the same on both sides."""
        file = self.folder / ".mirror.json"
        with (self.folder / ".mirror.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                known = json.loads(file.read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError):
                known = {}
            synced: Synced = {n: ((s[0], s[1]), version) for n, (s, version) in known.items()}
            try:
                yield synced
            finally:
                beside = self.folder / ".mirror.new"
                beside.write_text(json.dumps(synced), encoding="utf-8")
                beside.replace(file)


def told_files(stage: str) -> list[str]:
    """The scopes of a stage that are looked at from elsewhere."""
    return [f"{stage}/{name}" for name in TOLD]


def _stamp(file: Path) -> Stamp:
    about = file.stat()
    return about.st_size, about.st_mtime_ns


def _within(name: str, scope: str) -> bool:
    return name == scope or name.startswith(f"{scope}/")


def _travels(name: str) -> bool:
    parts = name.split("/")
    return parts[1:2] != [CHECKPOINTS] and not any(part.startswith(".") for part in parts)


def cached(url: str, purpose: str = "runs") -> Path:
    """This machine's folder for a run at a URL, below ``LLMSCALE_CACHE``.

    Args:
        purpose: ``runs`` for what runs there, ``views`` for what is only looked at: a look must
            not bring older files back into a folder where ranks write.

    Raises:
        RecipeError, MachineError: if the URL is none that can hold a run, or a package is missing.
        OSError: if the folder cannot be written.
    """
    url = Storage(url).url
    base = Path(os.environ.get("LLMSCALE_CACHE") or "~/.cache/llmscale").expanduser().absolute()
    folder = base / purpose / hashlib.sha256(url.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ".mirror").is_file():
        beside = folder / f".mirror.{os.getpid()}"
        beside.write_text(url + "\n", encoding="utf-8")
        beside.replace(folder / ".mirror")
    return folder


def opened(url: str, purpose: str = "runs") -> Path:
    """The same, after the storage has answered, with the run's recipe where there is one.

    Raises:
        RecipeError: if the URL is none that can hold a run.
        MachineError: if a package is missing, or the storage does not answer or refuses.
    """
    folder = cached(url, purpose)
    storage = Storage(url, SECONDS_TO_OPEN)
    try:
        storage.read("recipe.yaml")
        Mirror(folder, storage).pull("recipe.yaml")
    except StageError as error:
        raise MachineError(str(error)) from None
    return folder
