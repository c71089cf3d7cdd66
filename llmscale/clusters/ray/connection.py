"""Being a driver of a Ray cluster: of the one this process is in, or of one of its own."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from llmscale.errors import MachineError

SUBMISSION_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What Ray's job supervisor tells the process of a submitted job."""
CLUSTERS_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Read by Ray on every system: where it is 0, all that Ray starts listens on loopback alone."""
SECONDS_TO_CONNECT = 5.0
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}


def require_ray() -> None:
    """Checks that Ray is installed.

    Raises:
        MachineError: if it is not.
    """
    if find_spec("ray") is None:
        raise MachineError("cluster.on: Ray is not installed; pip install 'llmscale[ray]'")


def own_submission() -> str | None:
    """Ray's id of the submitted job that this process is; None outside of one."""
    told = os.environ.get(SUBMISSION_VARIABLE)
    if told is None:
        return None
    submission: str | None = json.loads(told).get("metadata", {}).get("job_submission_id")
    return submission


@contextmanager
def connected(cpus: int) -> Iterator[str]:
    """This process as a driver, for as long as the context lasts; gives its dashboard's address.

    Of the cluster that RAY_ADDRESS names, as in a Ray job; else of a Ray of its own on loopback,
    with as many CPUs as asked for.

    Args:
        cpus: what the largest task needs.

    Raises:
        MachineError: if there is no cluster at that address.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        os.environ[CLUSTERS_VARIABLE] = "0"
    else:
        _require_answer(address)
    import ray

    try:
        if address is None:
            most = max(cpus, os.cpu_count() or 1)
            context = ray.init("local", num_cpus=most, include_dashboard=False, **QUIET)
        else:
            context = ray.init(address, **QUIET)
    except Exception as error:  # Ray raises many kinds, bare ones among them
        where = "did not start here" if address is None else f"does not answer at {address}"
        raise MachineError(f"Ray {where}: {first_line(error)}") from None
    try:
        yield context.dashboard_url or ""
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Checks that something listens at ``HOST:PORT``; Ray itself would try for many minutes."""
    host, colon, port = address.rpartition(":")
    if not colon:
        return  # "auto", which Ray finds or refuses at once
    try:
        socket.create_connection((host, int(port)), SECONDS_TO_CONNECT).close()
    except (OSError, ValueError) as error:
        raise MachineError(f"no Ray answers at {address} (RAY_ADDRESS): {error}") from None


def first_line(error: Exception) -> str:
    """An error of Ray's, whose messages are long, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
