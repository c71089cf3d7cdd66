"""Pretraining a model on a tokenized corpus, at any layout."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import PositiveInt

from llmscale.artifacts import folder_fingerprint
from llmscale.clusters.base import ClusterSettings, Task
from llmscale.data.span_lengths import SHORTEST_INPUT, span_lengths
from llmscale.errors import RecipeError
from llmscale.models.architecture import Architecture
from llmscale.models.huggingface_config import read_architecture
from llmscale.parallel.layout import Layout
from llmscale.settings import NOT_IDENTITY, Problem, under
from llmscale.stages.base import (
    TOKENIZER_FILES,
    Link,
    RecipePath,
    RecipeView,
    Stage,
    StageOrFolder,
    Workspace,
)
from llmscale.stages.tokenizer import Tokenizer
from llmscale.training.settings import (
    Batch,
    Checkpointing,
    Health,
    Optimizer,
    Precision,
    Recompute,
    Validation,
)


class Pretrain(Stage):
    """``kind: pretrain``. Gives ``checkpoints/`` and, of the best one, ``hf/``.

    ``start_from`` is a Hugging Face folder, or what ``llmscale import`` made of one; the
    architecture then is the folder's, and ``model`` is left out. ``separate_documents``
    keeps documents packed into one sample from seeing each other.
    """

    kind: Literal["pretrain"]
    corpus: str
    tokenizer: StageOrFolder
    model: Architecture | None = None
    start_from: RecipePath | None = None
    sequence_length: PositiveInt | None = None
    separate_documents: bool = False
    parallel: Annotated[Layout, NOT_IDENTITY] = Layout()
    batch: Batch
    optimizer: Optimizer
    steps: PositiveInt
    precision: Precision = "fp32"
    recompute: Annotated[Recompute, NOT_IDENTITY] = "none"
    checkpoint: Checkpointing = Checkpointing()
    validation: Validation = Validation()
    health: Health = Health()

    product: ClassVar[str] = "hf"
    links: ClassVar[Mapping[str, Link]] = {
        "corpus": Link(("prepare",)),
        "tokenizer": Link(("tokenizer",), or_folder=True, folder_holds=TOKENIZER_FILES),
    }

    def architecture(self) -> Architecture:
        """The model's architecture, from the recipe or the folder it starts from.

        Raises:
            RecipeError: if the folder's ``config.json`` cannot be used.
        """
        if self.model is not None:
            return self.model
        return read_architecture(Path(str(self.start_from)))

    @property
    def window(self) -> int:
        """Tokens of a training sample that the model reads."""
        return self.sequence_length or self.architecture().sequence_length

    def problems(self, view: RecipeView) -> Iterator[Problem]:
        ranks, layout = view.cluster.ranks, self.parallel
        try:
            architecture = self._checked_architecture()
        except RecipeError as error:
            key = "model" if self.start_from is None or self.model is not None else "start_from"
            yield Problem((key,), str(error))
            return
        yield from under("model", architecture.problems())
        misfits = [
            *architecture.layout_problems(layout, self.sequence_length),
            *layout.problems(ranks=ranks),
        ]
        yield from under("parallel", misfits)
        if not misfits:
            batch_problems = self.batch.problems(
                data_ranks=layout.data_ranks(ranks),
                pipeline=layout.pipeline,
                virtual_pipeline=layout.virtual_pipeline,
            )
            yield from under("batch", batch_problems)
        yield from under("optimizer", self.optimizer.problems(self.steps))
        if architecture.traits.objective == "spans":
            yield from self._span_problems(architecture, view)
        if self.window > architecture.sequence_length:
            yield Problem(
                ("sequence_length",),
                f"{self.window} is above the model's {architecture.sequence_length}; "
                f"use at most {architecture.sequence_length}",
            )

    def _span_problems(self, architecture: Architecture, view: RecipeView) -> Iterator[Problem]:
        if self.separate_documents:
            yield Problem(
                ("separate_documents",), f"{architecture.family} cannot keep them apart; remove it"
            )
        if self.window < SHORTEST_INPUT:
            yield Problem(
                ("sequence_length",),
                f"{self.window} is too short to take spans out; use at least {SHORTEST_INPUT}",
            )
        tokenizer, needed = view.stages.get(self.tokenizer), span_lengths(self.window).spans
        if isinstance(tokenizer, Tokenizer) and tokenizer.sentinels < needed:
            yield Problem(
                ("tokenizer",),
                f"{self.tokenizer} has {tokenizer.sentinels} sentinels, but t5 needs {needed} at "
                f"sequence_length {self.window}; set sentinels: {needed} in {self.tokenizer}",
            )

    def _checked_architecture(self) -> Architecture:
        if (self.model is None) == (self.start_from is None):
            given = "neither is given" if self.model is None else "both are given"
            raise RecipeError(f"give either model or start_from, not both; {given}")
        return self.architecture()

    def sources(self) -> list[object]:
        return [self.start_from and folder_fingerprint(Path(self.start_from))]

    def tasks(self, cluster: ClusterSettings) -> tuple[Task, ...]:
        return (Task("tokens"), Task("train", cluster.ranks))

    def run(self, task: str, workspace: Workspace) -> None:
        if task == "tokens":
            from llmscale.stages.tokens import make_tokens

            make_tokens(self, workspace)
        else:
            from llmscale.stages.pretrain_rank import pretrain

            pretrain(self, workspace)
