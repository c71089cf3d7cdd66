"""What stages that go on with a model do alike on their ranks: tokens, rows, splits, steps."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llmscale.artifacts import StageFolder, read_json
from llmscale.data.chat import own_template
from llmscale.data.split import position, validation_threshold
from llmscale.errors import RecipeError
from llmscale.models.architecture import Architecture
from llmscale.models.huggingface_config import read_architecture, read_vocabulary
from llmscale.stages.base import Workspace
from llmscale.stages.engines import TrainedModel
from llmscale.stages.train_rank import Course
from llmscale.stages.tuned import ABOUT_EXAMPLES, TunedStage
from llmscale.training.data import TrainingData
from llmscale.training.data_sets import (
    DataSetSamples,
    DrawnSamples,
    FirstSamples,
    SampleObjective,
)
from llmscale.training.rows import RowForm

LENGTH_MULTIPLE = 8
SPLITS = ("train", "validation")
Made = TypeVar("Made")


def require_tokens(model: Path, tokenizer: Any) -> None:
    """Sees to it that a model's tokenizer can be used.

    Raises:
        RecipeError: says what it lacks.
    """
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            f"{model}: the tokenizer has no end-of-text token (eos_token); name one in its "
            "tokenizer_config.json"
        )
    if not tokenizer.is_fast:
        raise RecipeError(
            f"{model}: the tokenizer has no tokenizer.json, which tells where tokens begin; "
            "convert it by transformers"
        )
    rows = read_vocabulary(model)
    if len(tokenizer) > rows:
        raise RecipeError(
            f"{model}: its tokenizer has {len(tokenizer)} tokens, more than the model's {rows}; "
            "give a folder whose tokenizer is the model's own"
        )


def room(stage: TunedStage, model: Path) -> int:
    """Tokens a row has at most."""
    return stage.sequence_length or read_architecture(model).sequence_length


def chosen_template(stage: TunedStage, tokenizer: Any) -> str | None:
    """The template that the recipe names, else the model's own."""
    return stage.template_text() or own_template(tokenizer)


def no_template(model: Path) -> RecipeError:
    """What is wrong where a conversation cannot be written as text."""
    return RecipeError(f"{model}: the model has no chat template; set template: chatml")


def padding_token(tokenizer: Any) -> int:
    """What fills rows up: never the token that ends a text, by which its score is found."""
    known = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0, 1)
    end = tokenizer.eos_token_id
    return int(next(token for token in known if token is not None and token != end))


def split(made: Iterable[tuple[str, Made]], fraction: float, seed: int) -> dict[str, list[Made]]:
    """What was made by split; that of equal texts falls on the same side.

    Args:
        made: each with the text that decides.
    """
    placed = [(position(f"split {text}", seed), own) for text, own in made]
    threshold = validation_threshold(fraction, (place for place, _ in placed))
    return {
        "train": [own for place, own in placed if place >= threshold],
        "validation": [own for place, own in placed if place < threshold],
    }


def require_training(sets: Iterable[tuple[str, Sequence[object]]]) -> None:
    """Sees to it that every data set has something to train on.

    Raises:
        RecipeError: names one that has not.
    """
    for name, examples in sets:
        if not examples:
            raise RecipeError(
                f"{name} has no example to train on; give more records that can be used, or set "
                "validation_fraction: 0"
            )


def row_form(stage: TunedStage, model: Path, padding: int, device: str) -> RowForm:
    """How examples become rows at the stage's layout, on that device."""
    layout = stage.parallel
    of_device = LENGTH_MULTIPLE if device == "cuda" else 1
    multiple = math.lcm(of_device, layout.tensor * 2 * layout.context)
    return RowForm(padding, room(stage, model), multiple, shared=layout.pipeline == 1)


def tuned_model(
    stage: TunedStage,
    folder: StageFolder,
    start_from: Path,
    architecture: Architecture,
    beside: Mapping[str, Path] | None = None,
) -> TrainedModel:
    """The model that a stage trains, once its examples are made."""
    about = read_json(folder.path / ABOUT_EXAMPLES) or {}
    return TrainedModel(
        architecture=architecture,
        vocabulary=read_vocabulary(start_from),
        tokenizer=start_from,
        chat_template=about.get("template"),
        padding=about.get("padding"),
        adapter=stage.adapter,
        beside=beside or {},
    )


def tuned_course(
    stage: TunedStage,
    workspace: Workspace,
    model: TrainedModel,
    objective: SampleObjective[Made],
    sources: Mapping[str, DataSetSamples[Made]],
    held_out: Sequence[DataSetSamples[Made]],
) -> Course:
    """What a stage trains: its model, on the samples of its data sets."""
    one_length = stage.parallel.pipeline > 1
    drawn = DrawnSamples(sources, stage.weights(), objective)
    validation = FirstSamples(held_out, stage.validation.samples, objective, one_length)
    return Course(
        model=model,
        start_from=workspace.inputs["start_from"],
        data=TrainingData(stage.batch, [drawn], one_length),
        validation=validation if held_out else None,
        steps=_steps(stage, sum(map(len, sources.values()))),
        baseline=True,
        patience=stage.early_stopping.patience if stage.early_stopping else None,
    )


def _steps(stage: TunedStage, samples: int) -> int:
    """The recipe's steps, or those of its epochs, the last one counted whole.

    Raises:
        RecipeError: if the schedule does not fit into them.
    """
    if stage.steps is not None:
        return stage.steps
    wanted, found = stage.epochs * samples, 0  # type: ignore[operator]
    while (read := stage.batch.consumed(found)) < wanted:
        found += max(1, math.ceil((wanted - read) / stage.batch.global_))
    for problem in stage.optimizer.problems(found):
        raise RecipeError(f"{'.'.join(('optimizer', *problem.path))}: {problem.message}")
    return found
