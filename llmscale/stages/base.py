"""What a stage is: settings, links to other stages, checks, and what its ranks do."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import AfterValidator, ValidationInfo

from llmscale.artifacts import StageFolder, fingerprint
from llmscale.clusters.base import ClusterSettings, Task
from llmscale.progress import Progress
from llmscale.settings import Problem, Settings, identity


def _beside_recipe(path: str, info: ValidationInfo) -> str:
    base = (info.context or {}).get("folder", Path())
    return str(Path(base, Path(path).expanduser()).absolute())


RecipePath = Annotated[str, AfterValidator(_beside_recipe)]
"""A path in a recipe; relative ones start from the recipe's folder."""


def _stage_or_folder(name: str, info: ValidationInfo) -> str:
    context = info.context or {}
    folder = Path(context.get("folder", Path()), Path(name).expanduser())
    return (
        str(folder.absolute())
        if name not in context.get("stages", ()) and folder.is_dir()
        else name
    )


StageOrFolder = Annotated[str, AfterValidator(_stage_or_folder)]
"""The name of a stage, else a folder; relative ones start from the recipe's folder."""


class Link(NamedTuple):
    """A key that names another stage, of one of these kinds; or a folder, where allowed."""

    kinds: tuple[str, ...]
    or_folder: bool = False


@dataclass(frozen=True)
class RecipeView:
    """What a stage may see of the recipe around it when it checks itself."""

    stages: Mapping[str, "Stage"]
    cluster: ClusterSettings
    folder: Path


@dataclass(frozen=True)
class Workspace:
    """What a rank of a stage is given: folders, the seed, and its place among the ranks."""

    folder: StageFolder
    inputs: Mapping[str, Path]
    seed: int
    device: str
    progress: Progress
    rank: int = 0
    ranks: int = 1
    rendezvous: str = ""
    stages: Mapping[str, "Stage"] = field(default_factory=dict)


class Stage(Settings):
    """A function from finished folders to one folder, as a recipe describes it."""

    kind: str
    links: ClassVar[Mapping[str, Link]] = {}
    product: ClassVar[str] = ""
    """The part of the stage's folder that others are given; all of it by default."""

    def linked(self, stages: Mapping[str, "Stage"]) -> dict[str, str]:
        """The stages this one needs, by the key that names each."""
        named = {key: getattr(self, key) for key in self.links}
        return {key: name for key, name in named.items() if name in stages}

    def problems(self, view: RecipeView) -> Iterator[Problem]:
        """What is wrong with the settings, beyond their types."""
        return iter(())

    def sources(self) -> list[Any]:
        """Plain data that changes when files outside the run folder do."""
        return []

    def fingerprint(self, seed: int, inputs: Mapping[str, str]) -> str:
        """Says whether a finished folder still is what this stage would make."""
        return fingerprint([identity(self), self.sources(), seed, dict(inputs)])

    def tasks(self, cluster: ClusterSettings) -> tuple[Task, ...]:
        """The starts this stage needs, in order."""
        return (Task("run"),)

    def run(self, task: str, workspace: Workspace) -> None:
        """What one rank of one task does; importing torch is its own affair."""
        raise TypeError(f"a stage of kind {self.kind} has no run")
