"""The package as it was when a run was submitted: a copy in the run folder."""

import shutil
from pathlib import Path

import llmscale
from llmscale.artifacts import RunFolder, new_folder

CODE = "code"
PACKAGE = Path(llmscale.__file__).resolve().parent


def snapshot(folder: RunFolder) -> Path | None:
    """Copies the package into the run folder where it is a checkout that may change.

    Returns:
        the folder to import it from; None for an installed package.
    """
    target = snapshot_place(folder)
    if target is None:
        shutil.rmtree(folder.path / CODE, ignore_errors=True)
    elif not runs_from(target):
        with new_folder(target) as beside:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(PACKAGE, beside / PACKAGE.name, ignore=ignored)
    return target


def snapshot_place(folder: RunFolder) -> Path | None:
    """Where a run's copy of the package is put; None for an installed package."""
    installed = {"site-packages", "dist-packages"} & set(PACKAGE.parts)
    return None if installed else folder.path.absolute() / CODE


def code_of(folder: RunFolder) -> Path | None:
    """The snapshot that the run has, if it has one."""
    code = folder.path.absolute() / CODE
    return code if code.is_dir() else None


def runs_from(code: Path) -> bool:
    """Whether this process runs that copy of the package."""
    return PACKAGE.parent == code.resolve()
