"""A folder at a URL, by fsspec: whole files in and out, tried again while it cannot be reached.

Object stores keep or refuse a whole object, so no reader sees a part of one. They do not rename:
what several files make together counts once a last one is there, which names them.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from llmscale.errors import LlmscaleError, MachineError, RecipeError, StageError

SECONDS_TO_WAIT = 600.0
"""How long a storage that cannot be reached is tried again."""
LONGEST_PAUSE_SECONDS = 15.0
SECONDS_BETWEEN_LINES = 30.0
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""The extra of this package that brings what a scheme needs."""
OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"retries": {"max_attempts": 0}}},  # s3fs tries again by itself
}
LASTING = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    NotImplementedError,
)
"""Errors that trying again does not mend."""
MARKS_OF_VERSIONS = ("ETag", "etag", "md5Hash", "LastModified", "updated", "mtime")

Result = TypeVar("Result")


def is_url(place: str) -> bool:
    """Whether a run's place is at a URL: no path, and no ``file://`` of one."""
    return "://" in place and not place.startswith("file://")


def plain_path(place: str) -> Path:
    """The path that a place names which is no URL, or a ``file://`` one."""
    return Path(place.removeprefix("file://"))


def safe_url(url: str) -> str:
    """A URL that may be shown and logged.

    Raises:
        RecipeError: if it holds credentials, or what may be some.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise RecipeError(
            f"{shown}: give the URL without user, password or query; credentials come from the "
            "environment"
        )
    return url


def _say(line: str) -> None:
    with suppress(OSError):  # nobody may read it any more
        sys.stderr.write(line + "\n")


class Storage:
    """Files below a URL, by their names relative to it.

    Every method raises a StageError where the storage stays away, or refuses.

    Args:
        patience_seconds: how long to try again while it cannot be reached.
        say: told, in a line, that it cannot, every now and then.
    """

    def __init__(
        self,
        url: str,
        patience_seconds: float = SECONDS_TO_WAIT,
        say: Callable[[str], None] = _say,
    ) -> None:
        self.url = url.rstrip("/")
        self._patience = patience_seconds
        self._say = say
        self._files, self._root = _opened(self.url)

    def versions(self, scope: str = "") -> dict[str, str]:
        """The files in a folder, or the one of that name: what changes when each is written."""
        found = self._persist(
            lambda: self._files.find(self._at(scope), detail=True, withdirs=False)
        )
        names = {path.removeprefix(self._root).lstrip("/"): about for path, about in found.items()}
        return {name: _version(about) for name, about in names.items()}

    def read(self, name: str) -> bytes | None:
        """A small file's bytes; None where there is none."""
        try:
            return bytes(self._persist(lambda: self._files.cat_file(self._at(name))))
        except FileNotFoundError as error:
            if "bucket" in str(error) and self._root not in str(error):
                raise self._refusal(error) from None
            return None

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file."""
        self._told(lambda: self._files.pipe_file(self._at(name), content))

    def create(self, name: str, content: bytes) -> bool:
        """Writes a small file that is not there yet; whether it was not."""
        try:
            self._persist(lambda: self._files.pipe_file(self._at(name), content, mode="create"))
        except FileExistsError:
            return self.read(name) == content  # an answer may have been lost on its way
        except (OSError, NotImplementedError) as error:
            raise self._refusal(error) from None
        return True

    def upload(self, files: Mapping[str, Path]) -> None:
        """Puts files at names."""
        if files:
            local, remote = [str(file) for file in files.values()], self._all_at(files)
            self._told(lambda: self._files.put(local, remote))

    def download(self, files: Mapping[str, Path]) -> None:
        """Gets files, each beside its place first, and renamed.

        Raises:
            FileNotFoundError: if one is not there.
        """
        if not files:
            return
        besides = {name: file.with_name(f".{file.name}.part") for name, file in files.items()}
        for file in files.values():
            file.parent.mkdir(parents=True, exist_ok=True)
        remote, local = self._all_at(files), [str(beside) for beside in besides.values()]
        try:
            self._persist(lambda: self._files.get(remote, local))
            for name, file in files.items():
                besides[name].replace(file)
        finally:
            for beside in besides.values():
                beside.unlink(missing_ok=True)

    def remove(self, names: Sequence[str]) -> None:
        """Removes files that are there."""
        if names:
            with suppress(FileNotFoundError):
                self._persist(lambda: self._files.rm(self._all_at(names)))

    def copy(self, names: Mapping[str, str]) -> None:
        """Copies files within the storage, from the keys to the values."""
        if names:
            to = self._all_at(names.values())
            self._told(lambda: self._files.copy(self._all_at(names), to))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _all_at(self, names: Any) -> list[str]:
        return [self._at(name) for name in names]

    def _told(self, operation: Callable[[], Result]) -> Result:
        """``_persist`` for what is not asked whether it is there."""
        try:
            return self._persist(operation)
        except LASTING as error:
            raise self._refusal(error) from None

    def _persist(self, operation: Callable[[], Result]) -> Result:
        """Does something, again while the storage cannot be reached.

        Raises:
            FileNotFoundError, FileExistsError: as the operation does.
        """
        begun, told, pause = time.monotonic(), -SECONDS_BETWEEN_LINES, 0.5
        while True:
            try:
                return operation()
            except (FileNotFoundError, FileExistsError):
                raise
            except Exception as error:  # each library has kinds of its own
                waited = time.monotonic() - begun
                if isinstance(error, LASTING) or _lacks_credentials(error):
                    raise self._refusal(error) from None
                if waited + pause > self._patience:
                    self._patience = 0.0  # what is left to do on the way out is tried once
                    raise StageError(
                        f"{self.url}: cannot be reached ({cause(error)}), tried for {waited:.0f} "
                        "s; run the same command again when it can"
                    ) from None
                if waited - told >= SECONDS_BETWEEN_LINES:
                    told = waited
                    self._say(f"{self.url}: cannot be reached ({cause(error)}); trying again")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _refusal(self, error: Exception) -> LlmscaleError:
        return StageError(
            f"{self.url}: {cause(error)}; check the URL and what the environment says of the "
            "storage (credentials, endpoint)"
        )


def cause(error: BaseException) -> str:
    """An error of a storage's library, in a line."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _lacks_credentials(error: Exception) -> bool:
    return "credentials" in type(error).__name__.lower()


def _version(about: Mapping[str, Any]) -> str:
    mark = next((str(about[key]) for key in MARKS_OF_VERSIONS if about.get(key)), "")
    return f"{about['size']} {mark}"


def _opened(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path there.

    Raises:
        RecipeError: if the URL is none that can hold a run.
        MachineError: if a package is missing.
    """
    parts = urlsplit(safe_url(url))
    if not parts.netloc and parts.scheme in EXTRAS:
        raise RecipeError(f"{url}: names no bucket; give {parts.scheme}://BUCKET/FOLDER")
    import fsspec

    options = OPTIONS.get(parts.scheme, {})
    try:
        files, root = fsspec.url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        extra = EXTRAS.get(parts.scheme)
        mend = f"pip install 'llmscale[{extra}]'" if extra else cause(error)
        raise MachineError(f"{url}: a package for {parts.scheme}:// is missing; {mend}") from None
    except ValueError:
        raise RecipeError(
            f"{url}: no storage is known by {parts.scheme}://; use s3://, gs:// or a path"
        ) from None
    except Exception as error:
        raise MachineError(f"{url}: {cause(error)}; check the environment") from None
    return files, str(root).rstrip("/")
