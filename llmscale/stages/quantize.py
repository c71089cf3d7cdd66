"""A model with quantized weights, as a Hugging Face folder."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from llmscale.artifacts import version_of
from llmscale.clusters.base import ClusterSettings, Task
from llmscale.data.corpus import read_split
from llmscale.data.documents import read_documents
from llmscale.quantization.schemes import SCHEMES, Quantization
from llmscale.settings import Problem, Settings
from llmscale.stages.base import (
    MODEL_FILES,
    Link,
    RecipePattern,
    RecipeView,
    Stage,
    StageOrFolder,
    Workspace,
    matching_files,
)


class Calibration(Settings):
    """Texts to calibrate with: a split of the stage's corpus, or files; and how many tokens."""

    split: Literal["train", "validation"] | None = None
    text: RecipePattern | None = None
    tokens: PositiveInt = 32768

    def problems(self, has_corpus: bool) -> Iterator[Problem]:
        """What is wrong beyond types."""
        if (self.split is None) == (self.text is None):
            given = "neither is given" if self.text is None else "both are given"
            yield Problem((), f"give either split or text, not both; {given}")
        elif self.split is not None and not has_corpus:
            yield Problem(("split",), "there is no corpus to take it from; set corpus, or text")
        elif self.text is not None and not matching_files(self.text):
            yield Problem(("text",), f"no file matches {self.text}; give the path of a text file")

    def texts(self, corpus: Path | None) -> Iterator[str]:
        """The texts, one at a time."""
        if self.text is None:
            assert corpus is not None and self.split is not None
            yield from read_split(corpus, self.split)
            return
        for file in matching_files(self.text):
            for document in read_documents(file):
                yield document.text


class Quantize(Stage, Quantization):
    """``kind: quantize``. Gives ``hf/``."""

    kind: Literal["quantize"]
    model: StageOrFolder
    corpus: str | None = None
    calibration: Calibration | None = None

    product: ClassVar[str] = "hf"
    links: ClassVar[Mapping[str, Link]] = {
        "model": Link(("pretrain", "finetune", "dpo"), or_folder=True, folder_holds=MODEL_FILES),
        "corpus": Link(("prepare",)),
    }

    def linked(self, stages: Mapping[str, Stage]) -> dict[str, str]:
        """Without a ``corpus`` of its own, its model's."""
        named = super().linked(stages)
        trained_on = getattr(stages.get(self.model), "corpus", None)
        if "corpus" not in named and trained_on in stages:
            named["corpus"] = str(trained_on)
        return named

    def tasks(self, cluster: ClusterSettings) -> tuple[Task, ...]:
        return (Task("run"),)

    def sources(self) -> list[Any]:
        if self.calibration is None or self.calibration.text is None:
            return []
        return [[str(f), *version_of(f)] for f in matching_files(self.calibration.text)]

    def problems(self, view: RecipeView) -> Iterator[Problem]:
        for key, wrong in self.misplaced():
            yield Problem((key,), wrong)
        if SCHEMES[self.scheme].calibrated and self.calibration is None:
            yield Problem(
                ("scheme",),
                f"{self.scheme} is calibrated with texts; add calibration: {{split: train}}, or "
                "{text: FILE}",
            )
        if self.calibration is not None:
            for problem in self.calibration.problems("corpus" in self.linked(view.stages)):
                yield Problem(("calibration", *problem.path), problem.message)

    def run(self, task: str, workspace: Workspace) -> None:
        from llmscale.quantization.quantize import Listener, quantize

        calibration = self.calibration
        corpus = workspace.inputs.get("corpus")
        figures = quantize(
            workspace.inputs["model"],
            workspace.folder.hf,
            Quantization(scheme=self.scheme, group_size=self.group_size, symmetric=self.symmetric),
            calibration.texts(corpus) if calibration else None,
            tokens=calibration.tokens if calibration else 0,
            listener=Listener(
                lambda done, blocks: workspace.progress.update(done, blocks, "blocks"), print
            ),
        )
        workspace.folder.add_metrics(**figures)
