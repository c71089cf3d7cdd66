"""What every cluster answers: start the ranks of one task, and say how they ended."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import PositiveInt

from llmscale.clusters.ray.settings import RaySettings
from llmscale.clusters.slurm.settings import SlurmSettings
from llmscale.settings import Settings

ClusterName = Literal["local", "slurm", "ray"]


class ClusterSettings(Settings):
    """Where a recipe runs. ``nodes * ranks_per_node`` is the number of training ranks."""

    on: ClusterName = "local"
    nodes: PositiveInt = 1
    ranks_per_node: PositiveInt = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    slurm: SlurmSettings | None = None
    ray: RaySettings | None = None

    @property
    def ranks(self) -> int:
        """The number of training ranks."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Task:
    """One start of a stage's ranks.

    Attributes:
        on_device: whether it computes on the recipe's device; else on the CPU, whatever that is.
        neighbours: so many ranks in a row talk at every layer, and belong on one node.
        fewer: smaller numbers of ranks that give the same result, most first.
    """

    name: str
    ranks: int = 1
    nodes: int = 1
    on_device: bool = False
    neighbours: int = 1
    fewer: tuple[int, ...] = ()


@dataclass(frozen=True)
class Job:
    """A task of a stage of a run: all that a rank has to be told.

    Attributes:
        url: where the run is, if it is at one; ``run_folder`` is this machine's cache of it then.
        reads: the parts of the run folder, beside the stage's own, that the task reads.
    """

    run_folder: Path
    stage: str
    task: Task
    url: str | None = None
    reads: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The job in one line, for another process."""
        return json.dumps({**asdict(self), "run_folder": str(self.run_folder)})

    @staticmethod
    def from_json(text: str) -> "Job":
        """What ``to_json`` wrote."""
        written = json.loads(text)
        task = {**written["task"], "fewer": tuple(written["task"]["fewer"])}
        folder, reads = Path(written["run_folder"]), tuple(written["reads"])
        return Job(folder, written["stage"], Task(**task), written["url"], reads)


class Cluster(Protocol):
    """Where ranks run."""

    def run(self, job: Job) -> None:
        """Starts the job's ranks and returns when all have ended well.

        Raises:
            StageError: if a rank failed; names it, its own last line, and its log.
            Interrupted: if the ranks were asked to stop, and did.
        """
