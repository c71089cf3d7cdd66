"""The Ray job of a run, through Ray's Jobs API: submitted once, known by the run folder."""

import logging
import secrets
import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from llmscale.artifacts import RunFolder, now, read_json, write_json, write_text
from llmscale.clusters.ray.connection import SECONDS_TO_CONNECT, first_line, require_ray
from llmscale.clusters.snapshot import PACKAGE
from llmscale.errors import MachineError, StageError

SECONDS_TO_ANSWER = 30.0
SECONDS_TO_SAVE = 120
"""How long a job that is asked to stop may go on, to save."""
LIVE = ("PENDING", "RUNNING")
UNKNOWN = "UNKNOWN"
"""The state of a job that its cluster has never had, or has forgotten."""
UNREACHABLE = "UNREACHABLE"
"""The state of a job whose cluster does not answer."""
RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class RayJob:
    """A run's job on a Ray cluster.

    Attributes:
        job: Ray's id.
        address: of the cluster's dashboard, which serves the Jobs API.
        state: when it was last asked for: ``PENDING``, ``RUNNING``, ``SUCCEEDED``, ``FAILED``,
            ``STOPPED``, ``UNKNOWN`` or ``UNREACHABLE``.
    """

    job: str
    address: str
    submitted: str
    state: str = "PENDING"

    def __str__(self) -> str:
        return f"Ray job {self.job} ({self.state})"

    @property
    def live(self) -> bool:
        """Whether it may still do something."""
        return self.state in LIVE

    def asked(self) -> "RayJob":
        """The job in its state of now.

        Raises:
            MachineError: if the cluster does not answer.
        """
        with client(self.address) as jobs:
            try:
                return replace(self, state=str(jobs.get_job_status(self.job).value))
            except RuntimeError as error:
                if "does not exist" not in str(error):
                    raise
                return replace(self, state=UNKNOWN)

    def exit_code(self) -> int | None:
        """That of its process, once it has ended.

        Raises:
            MachineError: if the cluster does not answer, or does not know the job.
        """
        with client(self.address) as jobs:
            code: int | None = jobs.get_job_info(self.job).driver_exit_code
            return code

    def stop(self) -> None:
        """Asks it to save and stop; after ``SECONDS_TO_SAVE`` Ray ends it.

        Raises:
            MachineError: if the cluster does not answer, or does not know the job.
        """
        with client(self.address) as jobs:
            jobs.stop_job(self.job)

    def output(self) -> str:
        """What its process has said so far.

        Raises:
            MachineError: if the cluster does not answer, or does not know the job.
        """
        with client(self.address) as jobs:
            return str(jobs.get_job_logs(self.job))


def job_of(folder: RunFolder) -> RayJob | None:
    """The Ray job that the run was last submitted as."""
    entry = read_json(_file(folder))
    return None if entry is None else RayJob(**entry)


def note_job(folder: RunFolder, job: RayJob) -> None:
    """Makes a job known as the run's."""
    _file(folder).parent.mkdir(parents=True, exist_ok=True)
    write_json(_file(folder), asdict(job))
    folder.push("ray/job.json")


def note_state(folder: RunFolder, job: RayJob) -> None:
    """Notes a job's state, unless the run has another job by now."""
    known = job_of(folder)
    if known is not None and known.job == job.job and known.state != job.state:
        with suppress(OSError, StageError):  # the folder may be another user's, or the disk full
            note_job(folder, job)


def _file(folder: RunFolder) -> Path:
    return folder.path / "ray" / "job.json"


@contextmanager
def client(address: str) -> Iterator[Any]:
    """The Jobs API at an address.

    Raises:
        MachineError: if nobody answers there, or the answer is an error.
    """
    require_ray()
    where = urlsplit(address)
    try:
        port = where.port or (443 if where.scheme == "https" else 80)
        socket.create_connection((where.hostname or "", port), SECONDS_TO_CONNECT).close()
    except (OSError, ValueError) as error:
        raise MachineError(f"no Ray answers at {address}: {error}") from None
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Ray's, which by itself waits for ever for an answer."""

        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            options = {"timeout": SECONDS_TO_ANSWER, **options}
            return super()._do_request(*arguments, **options)

    logging.disable(logging.INFO)  # Ray tells of every upload
    try:
        yield Client(address)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        raise MachineError(f"Ray's Jobs API at {address}: {first_line(error)}") from None
    finally:
        logging.disable(logging.NOTSET)


def new_job(name: str, address: str) -> RayJob:
    """A job of that name that is yet to be submitted."""
    return RayJob(f"{name}-{secrets.token_hex(4)}", address, now())


def submit(job: RayJob, recipe: str, options: list[str]) -> None:
    """Submits ``llmscale run`` of a recipe, with this package and the recipe uploaded.

    Args:
        recipe: its text.
        options: of ``llmscale run``.

    Raises:
        MachineError: if the cluster does not answer, or refuses it.
    """
    command = ["python", "-m", "llmscale", "run", RECIPE, *options]
    with TemporaryDirectory() as upload, client(job.address) as jobs:
        write_text(Path(upload) / RECIPE, recipe)
        jobs.submit_job(
            entrypoint=shlex.join(command),
            submission_id=job.job,
            runtime_env={
                "working_dir": upload,
                "py_modules": [str(PACKAGE)],
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(SECONDS_TO_SAVE)},
            },
        )
