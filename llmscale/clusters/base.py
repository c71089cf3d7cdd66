"""What every cluster answers: start the ranks of one task, and say how they ended."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import PositiveInt

from llmscale.settings import Settings

ClusterName = Literal["local", "slurm", "ray"]


class ClusterSettings(Settings):
    """Where a recipe runs. ``nodes * ranks_per_node`` is the number of training ranks."""

    on: ClusterName = "local"
    nodes: PositiveInt = 1
    ranks_per_node: PositiveInt = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @property
    def ranks(self) -> int:
        """The number of training ranks."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Task:
    """One start of a stage's ranks."""

    name: str
    ranks: int = 1


@dataclass(frozen=True)
class Job:
    """A task of a stage of a run: all that a rank has to be told."""

    run_folder: Path
    stage: str
    task: Task


class Cluster(Protocol):
    """Where ranks run."""

    def run(self, job: Job) -> None:
        """Starts the job's ranks and returns when all have ended well.

        Raises:
            StageError: if a rank failed; names it, its own last line, and its log.
            Interrupted: if the ranks were asked to stop, and did.
        """
