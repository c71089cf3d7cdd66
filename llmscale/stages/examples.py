"""Instruction data as examples on disk: made once, before training starts."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from llmscale.artifacts import StageFolder, new_folder, read_json, write_json
from llmscale.data.chat import Example, encoded_conversation, own_template
from llmscale.data.conversations import conversation
from llmscale.data.examples import Examples, ExampleSamples, write_examples
from llmscale.data.records import Intake, Malformed
from llmscale.data.split import position, validation_threshold
from llmscale.data.tokenizer import load_tokenizer
from llmscale.errors import RecipeError
from llmscale.models.huggingface_config import read_architecture, read_vocabulary
from llmscale.stages.base import Workspace
from llmscale.stages.engines import TrainedModel
from llmscale.stages.finetune import ABOUT_EXAMPLES, DataSet, FewOfEach, Finetune
from llmscale.stages.train_rank import Course
from llmscale.training.data import TrainingData
from llmscale.training.supervised import Supervised, SupervisedSamples, SupervisedValidation

LENGTH_MULTIPLE = 8
SPLITS = ("train", "validation")


class Classed(NamedTuple):
    """An example and its class, which is empty where none is asked for."""

    example: Example
    name: str


@dataclass(frozen=True)
class _Reading:
    """How records become examples."""

    tokenizer: Any
    template: str
    most: int
    seed: int
    intake: Intake

    def examples(self, one: DataSet, on_file: Callable[[Path], None]) -> list[Classed]:
        """Those of a data set that can be used."""
        made: list[Classed] = []
        for file in one.files():
            on_file(file)
            made += [own for _, own in self.intake.made(partial(self._example, one.few), file)]
        return made

    def _example(self, few: FewOfEach | None, record: dict[str, Any]) -> Classed:
        example = encoded_conversation(conversation(record), self.tokenizer, self.template)
        if len(example) > self.most:
            raise Malformed("longer than the sequence", f"{len(example)} tokens, above {self.most}")
        return Classed(example, _class(record, few))


def make_examples(stage: Finetune, workspace: Workspace) -> None:
    """Writes ``examples/NAME/train.safetensors`` and ``.../validation...`` of each data set.

    Raises:
        RecipeError: if a record is malformed and that is refused, or none is left to train on.
    """
    model = workspace.inputs["start_from"]
    tokenizer = load_tokenizer(model)
    _require_tokens(model, tokenizer)
    template = _template(stage, model, tokenizer)
    reading = _Reading(tokenizer, template, room(stage, model), workspace.seed, Intake())
    files, done = sum(len(one.files()) for one in stage.data.values()), count()
    sets = {}
    for name, one in stage.data.items():
        examples = reading.examples(
            one, lambda file: workspace.progress.update(next(done), files, "files", file.name)
        )
        made = split_examples(examples, stage.validation_fraction, workspace.seed)
        if one.few is not None:
            made["train"] = _few(made["train"], one.few, workspace.seed)
        sets[name] = {split: [own.example for own in part] for split, part in made.items()}
    folder = workspace.folder
    folder.path.mkdir(parents=True, exist_ok=True)
    reading.intake.close(folder.path, stage.malformed, f"stages.{folder.path.name}.malformed")
    for name, splits in sets.items():
        if not splits["train"]:
            raise RecipeError(
                f"{name} has no example to train on; give more records that can be used, or set "
                "validation_fraction: 0"
            )
    _write(sets, folder, tokenizer, template)
    folder.add_metrics(malformed=reading.intake.counts())


def _write(
    sets: Mapping[str, Mapping[str, list[Example]]],
    folder: StageFolder,
    tokenizer: Any,
    template: str,
) -> None:
    counts = {
        name: {split: len(examples) for split, examples in splits.items()}
        for name, splits in sets.items()
    }
    padding = tokenizer.pad_token_id
    about = {
        "padding": tokenizer.eos_token_id if padding is None else padding,
        "template": template,
        "examples": counts,
    }
    with new_folder(folder.path / Path(ABOUT_EXAMPLES).parent) as beside:
        for name, splits in sets.items():
            (beside / name).mkdir()
            for split, examples in splits.items():
                write_examples(examples, _file(beside, name, split))
        write_json(beside / Path(ABOUT_EXAMPLES).name, about)
    folder.add_metrics(examples=counts)


def _require_tokens(model: Path, tokenizer: Any) -> None:
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


def room(stage: Finetune, model: Path) -> int:
    """Tokens a sample has at most."""
    return stage.sequence_length or read_architecture(model).sequence_length


def _template(stage: Finetune, model: Path, tokenizer: Any) -> str:
    template = stage.template_text() or own_template(tokenizer)
    if template is None:
        raise RecipeError(f"{model}: the model has no chat template; set template: chatml")
    return template


def _file(folder: Path, name: str, split: str) -> Path:
    return folder / name / f"{split}.safetensors"


def _class(record: Mapping[str, Any], few: FewOfEach | None) -> str:
    if few is None:
        return ""
    if few.class_key not in record:
        raise Malformed("missing field", few.class_key)
    return json.dumps(record[few.class_key], sort_keys=True)


def _few(made: list[Classed], few: FewOfEach, seed: int) -> list[Classed]:
    """The first so many of each class, in an order that the seed gives."""
    chosen: defaultdict[str, list[Classed]] = defaultdict(list)
    for own in sorted(made, key=lambda own: _position(own.example, seed, "few")):
        if len(chosen[own.name]) < few.examples:
            chosen[own.name].append(own)
    return [own for each in chosen.values() for own in each]


def _position(example: Example, seed: int, purpose: str = "split") -> float:
    return position(f"{purpose} {example.tokens_n.tobytes().hex()}", seed)


def split_examples(made: list[Classed], fraction: float, seed: int) -> dict[str, list[Classed]]:
    """Examples by split; equal ones fall on the same side."""
    placed = [(_position(own.example, seed), own) for own in made]
    threshold = validation_threshold(fraction, (place for place, _ in placed))
    return {
        "train": [own for place, own in placed if place >= threshold],
        "validation": [own for place, own in placed if place < threshold],
    }


def fine_tuned(stage: Finetune, folder: StageFolder, start_from: Path) -> TrainedModel:
    """The model that a stage of fine-tuning trains, once its examples are made."""
    return TrainedModel(
        architecture=read_architecture(start_from),
        vocabulary=read_vocabulary(start_from),
        tokenizer=start_from,
        chat_template=(read_json(folder.path / ABOUT_EXAMPLES) or {}).get("template"),
        adapter=stage.adapter,
    )


def fine_tuning(stage: Finetune, workspace: Workspace) -> Course:
    """What a stage of fine-tuning trains."""
    model = workspace.inputs["start_from"]
    about = read_json(workspace.folder.path / ABOUT_EXAMPLES)
    objective = Supervised(
        padding=about["padding"],
        room=room(stage, model),
        multiple=math.lcm(LENGTH_MULTIPLE, stage.parallel.tensor * 2 * stage.parallel.context),
        several=stage.packing,
    )
    sources = {name: _samples(stage, workspace, name, "train") for name in stage.data}
    held_out = [
        _samples(stage, workspace, name, "validation")
        for name, counts in about["examples"].items()
        if counts["validation"]
    ]
    return Course(
        model=fine_tuned(stage, workspace.folder, model),
        start_from=model,
        data=TrainingData(stage.batch, [SupervisedSamples(sources, stage.weights(), objective)]),
        validation=SupervisedValidation(held_out, stage.validation.samples, objective)
        if held_out
        else None,
        steps=stage.steps or _steps(stage, sum(map(len, sources.values()))),
        baseline=True,
        patience=stage.early_stopping.patience if stage.early_stopping else None,
    )


def _samples(stage: Finetune, workspace: Workspace, name: str, split: str) -> ExampleSamples:
    folder = workspace.folder.path / Path(ABOUT_EXAMPLES).parent
    examples = Examples(_file(folder, name, split))
    most = room(stage, workspace.inputs["start_from"])
    return ExampleSamples(examples, most, stage.packing, workspace.seed)


def _steps(stage: Finetune, samples: int) -> int:
    """The steps of the epochs, the last one counted whole.

    Raises:
        RecipeError: if the schedule does not fit into them.
    """
    wanted, steps = stage.epochs * samples, 0  # type: ignore[operator]
    while (read := stage.batch.consumed(steps)) < wanted:
        steps += max(1, math.ceil((wanted - read) / stage.batch.global_))
    for problem in stage.optimizer.problems(steps):
        raise RecipeError(f"{'.'.join(('optimizer', *problem.path))}: {problem.message}")
    return steps
