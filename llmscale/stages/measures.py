"""What ``kind: evaluate`` measures, as a recipe says it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from llmscale.errors import RecipeError
from llmscale.evaluation.classification_form import ClassificationForm, Task, read_task
from llmscale.evaluation.generation import Decoding, Generation
from llmscale.evaluation.referenced import Referenced, read_referenced
from llmscale.settings import Problem, Settings
from llmscale.stages.base import RecipePath, is_file, is_folder


class Perplexity(Settings):
    """Which text is scored, and by windows of which length and stride, in tokens."""

    split: Literal["train", "validation"] | None = None
    text: RecipePath | None = None
    window: int | None = Field(default=None, ge=2)
    stride: PositiveInt | None = None

    def problems(self, has_corpus: bool) -> Iterator[Problem]:
        """What is wrong beyond types.

        Args:
            has_corpus: whether there is one that a split could be of.
        """
        if (self.split is None) == (self.text is None):
            given = "neither is given" if self.text is None else "both are given"
            yield Problem((), f"give either split or text, not both; {given}")
        elif self.split is not None and not has_corpus:
            yield Problem(
                ("split",),
                "there is no corpus to take it from; set corpus, or give perplexity.text",
            )
        elif self.text is not None and not is_file(self.text):
            yield Problem(("text",), f"{self.text} is no file; give a text file's path")
        if self.window and self.stride and self.stride > self.window:
            yield Problem(
                ("stride",),
                f"{self.stride} is above window {self.window}, which would leave "
                f"tokens out; use at most {self.window}",
            )

    def files(self) -> list[str]:
        """Those that are read, outside the run folder."""
        return [self.text] if self.text is not None else []


class Classification(ClassificationForm):
    """A file of labelled texts, how a model is asked about them, and a file of examples."""

    path: RecipePath
    examples: RecipePath | None = None

    def task(self) -> Task:
        """The texts and the examples.

        Raises:
            RecipeError: names the file and line that cannot be used.
        """
        return read_task(self, Path(self.path), Path(self.examples) if self.examples else None)

    def problems(self) -> Iterator[Problem]:
        """What is wrong beyond types, the files' records included."""
        wrong = [*self.form_problems(), *_missing(self.files())]
        yield from wrong
        if not wrong:
            yield from _unreadable(self.task)

    def files(self) -> list[str]:
        """Those that are read."""
        return [file for file in (self.path, self.examples) if file is not None]


class WrittenTexts(Generation):
    """A file of prompts with what may be written behind them."""

    path: RecipePath

    def records(self) -> list[Referenced]:
        """The prompts.

        Raises:
            RecipeError: names the file and line that cannot be used.
        """
        return read_referenced(Path(self.path))

    def problems(self) -> Iterator[Problem]:
        """What is wrong beyond types, the file's records included."""
        wrong = list(_missing(self.files()))
        yield from wrong or _unreadable(self.records)

    def files(self) -> list[str]:
        """Those that are read."""
        return [self.path]


class Tasks(Settings):
    """Tasks of lm-evaluation-harness; ``folder`` holds the YAML files of more of them."""

    names: tuple[str, ...] = Field(min_length=1)
    folder: RecipePath | None = None

    def problems(self) -> Iterator[Problem]:
        """What is wrong beyond types."""
        if self.folder is not None and not is_folder(self.folder):
            yield Problem(("folder",), f"{self.folder} is no folder; give one with YAML files")

    def files(self) -> list[str]:
        """The YAML files, and what lies beside them."""
        if self.folder is None:
            return []
        return sorted(str(file) for file in Path(self.folder).rglob("*") if file.is_file())


class Samples(Generation):
    """Texts the model goes on from."""

    prompts: tuple[str, ...] = Field(min_length=1)
    decoding: Decoding = "sample"


def _missing(files: list[str]) -> Iterator[Problem]:
    for file in files:
        if not is_file(file):
            yield Problem((), f"{file} is no file; give one with a JSON object a line")


def _unreadable(read: Callable[[], object]) -> Iterator[Problem]:
    try:
        read()
    except RecipeError as error:
        yield Problem((), str(error))
