"""Text to a cleaned corpus, split into training and validation."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from llmscale.artifacts import version_of
from llmscale.data.corpus import write_corpus
from llmscale.data.documents import Document, read_documents
from llmscale.errors import RecipeError
from llmscale.settings import Problem, Settings
from llmscale.stages.base import RecipePattern, RecipeView, Stage, Workspace, matching_files


class Source(Settings):
    """Files of text (``.jsonl``: a document a line; any other: a document a file)."""

    path: RecipePattern
    text_key: str = "text"

    def files(self) -> list[Path]:
        """The files the pattern names, sorted."""
        return matching_files(self.path)


class Prepare(Stage):
    """``kind: prepare``."""

    kind: Literal["prepare"]
    sources_: tuple[Source, ...] = Field(alias="sources", min_length=1)
    validation_fraction: float = Field(default=0.01, ge=0, lt=1)

    def problems(self, view: RecipeView) -> Iterator[Problem]:
        for index, source in enumerate(self.sources_):
            if not source.files():
                yield Problem(
                    ("sources", str(index), "path"),
                    f"no file matches {source.path}; give the path of a text file, from the "
                    "recipe's folder on",
                )

    def sources(self) -> list[list[object]]:
        return [
            [str(file), *version_of(file)] for source in self.sources_ for file in source.files()
        ]

    def imports(self) -> tuple[str, ...]:
        return ()

    def run(self, task: str, workspace: Workspace) -> None:
        files = [(file, source) for source in self.sources_ for file in source.files()]

        def documents() -> Iterator[Document]:
            for number, (file, source) in enumerate(files):
                workspace.progress.update(number, len(files), "files", file.name)
                yield from read_documents(file, source.text_key)

        counts = write_corpus(
            documents, workspace.folder.path, self.validation_fraction, workspace.seed
        )
        workspace.progress.update(len(files), len(files), "files")
        if not counts["train"]["documents"]:
            raise RecipeError(
                "no document is left for training; add documents or lower validation_fraction"
            )
        workspace.folder.add_metrics(**counts)
