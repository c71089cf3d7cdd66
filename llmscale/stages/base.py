"""What a stage is: settings, links to other stages, checks, and what its ranks do."""

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import AfterValidator, ValidationInfo

from llmscale.artifacts import StageFolder, fingerprint
from llmscale.clusters.base import ClusterSettings, Task
from llmscale.progress import Progress
from llmscale.settings import Problem, Settings, identity, shown


def _beside(folder: Path, path: str) -> str:
    if "\0" in path:
        raise ValueError(f"{shown(path)} holds a zero byte; remove it")
    try:
        return str(Path(folder, Path(path).expanduser()).absolute())
    except RuntimeError:
        raise ValueError(f"{shown(path)} names no user's home; write the path out") from None


def _recipe_folder(info: ValidationInfo) -> Path:
    return Path((info.context or {}).get("folder", Path()))


def beside_recipe(path: str, info: ValidationInfo) -> str:
    """A path as a recipe has it, from the recipe's folder on."""
    return _beside(_recipe_folder(info), path)


def _pattern_beside_recipe(pattern: str, info: ValidationInfo) -> str:
    return _beside(Path(glob.escape(str(_recipe_folder(info).absolute()))), pattern)


RecipePath = Annotated[str, AfterValidator(beside_recipe)]
"""A path in a recipe; relative ones start from the recipe's folder."""

RecipePattern = Annotated[str, AfterValidator(_pattern_beside_recipe)]
"""Paths in a recipe, with ``*``, ``?``, ``[...]`` and ``**`` as in a shell."""


def is_folder(path: str) -> bool:
    """Whether a folder is there; a path no system would take is none."""
    try:
        return Path(path).is_dir()
    except OSError:
        return False


def is_file(path: str) -> bool:
    """Whether a file is there; a path no system would take is none."""
    try:
        return Path(path).is_file()
    except OSError:
        return False


def matching_files(pattern: str) -> list[Path]:
    """The files that a ``RecipePattern`` names, sorted."""
    return sorted(Path(name) for name in glob.glob(pattern, recursive=True) if is_file(name))


def _stage_or_folder(name: str, info: ValidationInfo) -> str:
    if name in (info.context or {}).get("stages", ()):
        return name
    folder = _beside(_recipe_folder(info), name)
    return folder if is_folder(folder) else name


TOKENIZERS = "transformers.models.auto.tokenization_auto"
"""The module that every stage needs which reads texts as tokens."""
MODEL_FILES = ("config.json",)
MODEL_KINDS = ("pretrain", "finetune", "dpo", "ppo")
"""The stages whose product is a language model."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")

StageOrFolder = Annotated[str, AfterValidator(_stage_or_folder)]
"""The name of a stage, else a folder; relative ones start from the recipe's folder."""


class Link(NamedTuple):
    """A key that names another stage, of one of these kinds; or a folder, where allowed.

    ``folder_holds`` are the files by which such a folder is known; it has one of them at least.
    """

    kinds: tuple[str, ...]
    or_folder: bool = False
    folder_holds: tuple[str, ...] = ()


class Named(NamedTuple):
    """A name a stage gives, where it stands in the stage, and what it may name."""

    path: tuple[str, ...]
    name: str
    link: Link

    @property
    def key(self) -> str:
        """The path as one word, by which the stage's inputs are known."""
        return ".".join(self.path)


@dataclass(frozen=True)
class RecipeView:
    """What a stage may see of the recipe around it when it checks itself."""

    stages: Mapping[str, "Stage"]
    cluster: ClusterSettings


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


class Stage(Settings):
    """A function from finished folders to one folder, as a recipe describes it."""

    kind: str
    links: ClassVar[Mapping[str, Link]] = {}
    product: ClassVar[str] = ""
    """The part of the stage's folder that others are given; all of it by default."""

    def named(self) -> Iterator[Named]:
        """The stages and folders this one names."""
        for key, link in self.links.items():
            if (name := getattr(self, key)) is not None:
                yield Named((key,), name, link)

    def linked(self, stages: Mapping[str, "Stage"]) -> dict[str, str]:
        """The stages this one needs, by the key that names each."""
        return {named.key: named.name for named in self.named() if named.name in stages}

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

    def imports(self) -> tuple[str, ...]:
        """Modules that its ranks import and that take seconds, besides torch and megatron-core."""
        return (TOKENIZERS,)

    def run(self, task: str, workspace: Workspace) -> None:
        """What one rank of one task does; importing torch is its own affair."""
        raise TypeError(f"a stage of kind {self.kind} has no run")


class ModelStage(Stage):
    """A stage that looks at a finished model, and at its corpus unless another one is named."""

    model: StageOrFolder
    corpus: str | None = None

    links: ClassVar[Mapping[str, Link]] = {
        "model": Link(MODEL_KINDS, or_folder=True, folder_holds=MODEL_FILES),
        "corpus": Link(("prepare",)),
    }

    def linked(self, stages: Mapping[str, "Stage"]) -> dict[str, str]:
        """Without a ``corpus`` of its own, its model's, unless that was trained on a ``blend``."""
        named = super().linked(stages)
        trained_on = getattr(stages.get(self.model), "corpus", None)
        if "corpus" not in named and trained_on in stages:
            named["corpus"] = str(trained_on)
        return named
