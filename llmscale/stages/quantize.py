"""A model with quantized weights, as a Hugging Face folder."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import PositiveInt

from llmscale.artifacts import version_of
from llmscale.clusters.base import ClusterSettings, Task
from llmscale.data.corpus import read_split
from llmscale.data.documents import read_documents
from llmscale.quantization.schemes import SCHEMES, Quantization
from llmscale.settings import NOT_IDENTITY, Problem, Settings
from llmscale.stages.base import ModelStage, RecipePattern, RecipeView, Workspace, matching_files
from llmscale.stages.shared import met, sharing_problems, sharing_task


class Texts(Settings):
    """Texts of a split of the stage's corpus, or of files."""

    split: Literal["train", "validation"] | None = None
    text: RecipePattern | None = None

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

    def sources(self) -> list[Any]:
        """Plain data that changes when a file does."""
        files = matching_files(self.text) if self.text is not None else []
        return [[str(file), *version_of(file)] for file in files]


class Calibration(Texts):
    """Texts to calibrate with, and how many tokens of them."""

    tokens: PositiveInt = 32768


class QuantizedStage(ModelStage):
    """What stages that quantize have in common."""

    calibration: Calibration | None = None

    def tasks(self, cluster: ClusterSettings) -> tuple[Task, ...]:
        return (Task("run"),)

    def texts(self) -> Mapping[str, Texts]:
        """The texts that are read, by the key they stand under."""
        return {} if self.calibration is None else {"calibration": self.calibration}

    def sources(self) -> list[Any]:
        return [texts.sources() for texts in self.texts().values()]

    def calibration_problems(self, path: tuple[str, ...], name: str | None) -> Iterator[Problem]:
        """What is lacking where ``path`` asks for what is calibrated, unless that is nothing."""
        if name is not None and self.calibration is None:
            yield Problem(
                path,
                f"{name} is calibrated with texts; add calibration: {{split: train}}, or "
                "{text: FILE}",
            )

    def problems(self, view: RecipeView) -> Iterator[Problem]:
        for key, texts in self.texts().items():
            for problem in texts.problems("corpus" in self.linked(view.stages)):
                yield Problem((key, *problem.path), problem.message)


class Quantize(QuantizedStage, Quantization):
    """``kind: quantize``. Gives ``hf/``.

    So many ``ranks`` share the calibration's windows; they are processes on the CPU of one node.
    """

    kind: Literal["quantize"]
    ranks: Annotated[PositiveInt, NOT_IDENTITY] = 1

    product: ClassVar[str] = "hf"

    def tasks(self, cluster: ClusterSettings) -> tuple[Task, ...]:
        return (sharing_task(self.ranks, on_device=False),)

    def problems(self, view: RecipeView) -> Iterator[Problem]:
        if self.ranks > 1 and self.calibrates is None:
            yield Problem(("ranks",), f"{self.scheme} is not calibrated; remove it")
        yield from sharing_problems(self.ranks, view.cluster)
        asking = "scheme" if SCHEMES[self.scheme].calibrated else "key_value_cache"
        yield from self.calibration_problems((asking,), self.calibrates)
        yield from super().problems(view)
        for key, wrong in self.misplaced():
            yield Problem((key,), wrong)
        yield from self._trained_otherwise(view)

    def _trained_otherwise(self, view: RecipeView) -> Iterator[Problem]:
        """Settings of the scheme that are not those for which the weights were trained."""
        trained = getattr(view.stages.get(self.model), "quantization_aware", None)
        if trained is None or trained.scheme != self.scheme:
            return
        learned = trained.quantization()
        for key in ("group_size", "symmetric", "observer"):
            own, wanted = getattr(self, key), getattr(learned, key)
            if own != wanted:
                mend = "its default; remove it" if wanted is None else f"{wanted}; use that".lower()
                yield Problem((key,), f"{self.model} was trained for {mend}")

    def run(self, task: str, workspace: Workspace) -> None:
        with met(workspace, "cpu"):
            self._quantize(workspace)

    def _quantize(self, workspace: Workspace) -> None:
        from llmscale.quantization.quantize import Listener, quantize

        calibration = self.calibration
        corpus = workspace.inputs.get("corpus")
        figures = quantize(
            workspace.inputs["model"],
            workspace.folder.hf,
            Quantization(**{key: getattr(self, key) for key in Quantization.model_fields}),
            calibration.texts(corpus) if calibration else None,
            tokens=calibration.tokens if calibration else 0,
            listener=Listener(
                lambda done, blocks: workspace.progress.update(done, blocks, "blocks"), print
            )
            if workspace.rank == 0
            else None,
        )
        if workspace.rank == 0:
            workspace.folder.add_metrics(**figures)
