"""Packages that not every machine has, and how to get them."""

from importlib.util import find_spec

from llmscale.errors import MachineError


def require_package(asker: str, package: str, extra: str, instead: str = "") -> None:
    """Sees to it that a package is there.

    Args:
        asker: what needs it, by which the error begins.
        extra: llmscale's own that brings it.
        instead: what to do without it.

    Raises:
        MachineError: names the command that installs it.
    """
    if find_spec(package) is None:
        raise missing_package(asker, package, extra, instead)


def missing_package(asker: str, package: str, extra: str, instead: str = "") -> MachineError:
    """The line that says so."""
    mend = f"pip install 'llmscale[{extra}]'" + (f", or {instead}" if instead else "")
    return MachineError(f"{asker}: the package {package} is missing; {mend}")
