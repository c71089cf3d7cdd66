"""What stages that go on with a trained model, on data sets of records, have in common."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from llmscale.artifacts import version_of
from llmscale.clusters.base import ClusterSettings, Task
from llmscale.data.blend import whole_shares
from llmscale.data.records import OnMalformed
from llmscale.data.templates import TEMPLATES
from llmscale.errors import RecipeError
from llmscale.models.architecture import Architecture
from llmscale.models.huggingface_config import read_architecture, read_vocabulary
from llmscale.settings import Name, Problem, Settings, under
from llmscale.stages.base import (
    MODEL_FILES,
    MODEL_KINDS,
    Link,
    RecipePattern,
    RecipeView,
    Stage,
    StageOrFolder,
    matching_files,
)
from llmscale.stages.pretrain import Pretrain
from llmscale.stages.tokenizer import Tokenizer
from llmscale.stages.trained import TrainedStage
from llmscale.training.settings import Adapter

ABOUT_EXAMPLES = "examples/examples.json"
"""The file in a stage's folder that says what its examples are, and that they are whole."""

Template = Literal["chatml", "alpaca", "plain"]


class DataFiles(Settings):
    """Files of records.

    ``weight`` is the set's part of the samples, beside the other sets'.
    """

    path: RecipePattern
    weight: PositiveFloat = 1.0

    def files(self) -> list[Path]:
        """The files the pattern names, sorted."""
        return matching_files(self.path)


class EarlyStopping(Settings):
    """After ``patience`` validations in a row without a better loss training ends."""

    patience: PositiveInt


class TunedStage(TrainedStage):
    """A stage that goes on with a model, by records of data sets.

    ``template`` turns conversations into text; left out, it is the model's own. A record that
    cannot be used is refused, or skipped and counted, as ``malformed`` says. Training lasts
    ``steps``, or ``epochs`` of all data sets together.
    """

    start_from: StageOrFolder
    data: Mapping[Name, DataFiles]
    template: Template | None = None
    sequence_length: PositiveInt | None = None
    malformed: OnMalformed = "refuse"
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    adapter: Adapter | None = None
    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    early_stopping: EarlyStopping | None = None

    about: ClassVar[str] = ABOUT_EXAMPLES
    links: ClassVar[Mapping[str, Link]] = {
        "start_from": Link(MODEL_KINDS, or_folder=True, folder_holds=MODEL_FILES),
    }

    @field_validator("data")
    @classmethod
    def _weights_that_repeat(cls, data: Mapping[str, DataFiles]) -> Mapping[str, DataFiles]:
        whole_shares({name: one.weight for name, one in data.items()})
        return data

    def weights(self) -> dict[str, float]:
        """Each data set's part of the samples."""
        return {name: one.weight for name, one in self.data.items()}

    def problems(self, view: RecipeView) -> Iterator[Problem]:
        for name, one in self.data.items():
            if not one.files():
                yield Problem(
                    ("data", name, "path"),
                    f"no file matches {one.path}; give the path of a file of records, from the "
                    "recipe's folder on",
                )
        if (self.steps is None) == (self.epochs is None):
            given = "neither is given" if self.steps is None else "both are given"
            yield Problem((), f"give either steps or epochs, not both; {given}")
        elif self.steps is not None:
            yield from under("optimizer", self.optimizer.problems(self.steps))
        if self.early_stopping is not None and self.validation_fraction == 0:
            yield Problem(
                ("early_stopping",),
                "looks at the validation loss, and validation_fraction is 0; raise that, or "
                "remove it",
            )
        try:
            architecture = self.architecture(view.stages)
        except RecipeError as error:
            yield Problem(("start_from",), str(error))
            return
        yield from self._model_problems(architecture, view)

    def architecture(self, stages: Mapping[str, Stage]) -> Architecture:
        """That of the model to start from.

        Raises:
            RecipeError: if a folder's ``config.json`` cannot be used, or if there is more to the
                model than its weights.
        """
        stage = stages.get(self.start_from)
        if isinstance(stage, Pretrain):
            return stage.architecture()
        if isinstance(stage, TunedStage):
            if stage.adapter is not None and stage.adapter.virtual:
                raise RecipeError(
                    f"{self.start_from} trains virtual tokens, which are no part of its weights "
                    "and would be lost; use what it starts from itself"
                )
            return stage.architecture(stages)
        return read_architecture(Path(self.start_from))

    def _model_problems(self, architecture: Architecture, view: RecipeView) -> Iterator[Problem]:
        if architecture.traits.objective != "causal":
            yield Problem(
                ("start_from",),
                f"{architecture.family} does not go on from a text, so it cannot answer; use a "
                "decoder, such as llama",
            )
            return
        if architecture.experts:
            yield Problem(
                ("start_from",),
                f"{architecture.family} has experts, whose balance is not weighed for answers "
                "alone here; use a model without",
            )
            return
        longest, wanted = architecture.sequence_length, self.sequence_length
        if wanted is not None and wanted > longest:
            yield Problem(
                ("sequence_length",),
                f"{wanted} is above the model's {longest}; use at most {longest}",
            )
            return
        yield from self.training_problems(architecture, view.cluster, wanted)
        if self.adapter is not None:
            yield from self._adapter_problems(self.adapter, architecture)

    def _adapter_problems(self, adapter: Adapter, architecture: Architecture) -> Iterator[Problem]:
        misfits = adapter.problems(self.engine, architecture.family, self.zero)
        yield from under("adapter", misfits)
        longest = architecture.sequence_length
        wanted = self.sequence_length or longest
        if wanted + adapter.virtual > longest:
            yield Problem(
                ("sequence_length",),
                f"{wanted} and {adapter.virtual} virtual tokens are above the model's {longest}; "
                f"{_at_most(longest - adapter.virtual)}",
            )
        if adapter.method == "prefix" and self.recompute != "none":
            yield Problem(
                ("recompute",), "a prefix's keys and values are not computed again; remove it"
            )
        if self.engine == "megatron" and self.precision == "fp8":
            yield Problem(
                ("precision",),
                "fp8 needs layers of Transformer Engine, beside which engine megatron has no "
                "adapter; use bf16",
            )

    def sources(self) -> list[object]:
        return [
            [str(file), *version_of(file)] for one in self.data.values() for file in one.files()
        ]

    def tasks(self, cluster: ClusterSettings) -> tuple[Task, ...]:
        return (Task("examples"), self.training_task(cluster))

    def template_text(self) -> str | None:
        """The chosen template, in Jinja."""
        return None if self.template is None else TEMPLATES[self.template]


def _at_most(length: int) -> str:
    return f"use at most {length}" if length > 0 else "lower adapter.virtual_tokens"


def vocabulary_of(stage: Stage, stages: Mapping[str, Stage]) -> int:
    """Tokens that the model of a training stage knows.

    Raises:
        RecipeError: if a folder's ``config.json`` or tokenizer does not say.
    """
    if isinstance(stage, TunedStage):
        start = stages.get(stage.start_from)
        if start is not None:
            return vocabulary_of(start, stages)
        return read_vocabulary(Path(stage.start_from))
    assert isinstance(stage, Pretrain), "there is no third kind that trains"
    if stage.start_from is not None:
        return read_vocabulary(Path(stage.start_from))
    tokenizer = stages.get(stage.tokenizer)
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.vocabulary_size
    from llmscale.data.tokenizer import load_tokenizer

    return len(load_tokenizer(Path(stage.tokenizer)))
