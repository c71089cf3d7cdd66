"""Instruction data as examples on disk: made once, before training starts."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmscale.artifacts import StageFolder, new_folder, read_json, write_json
from llmscale.data.chat import Example, encoded_conversation
from llmscale.data.conversations import conversation
from llmscale.data.examples import Examples, ExampleSamples, write_examples
from llmscale.data.records import Intake, Malformed
from llmscale.data.split import position
from llmscale.data.tokenizer import load_tokenizer
from llmscale.models.architecture import Architecture
from llmscale.models.huggingface_config import read_architecture
from llmscale.stages import tuning
from llmscale.stages.base import Workspace
from llmscale.stages.finetune import DataSet, FewOfEach, Finetune, group_size
from llmscale.stages.train_rank import Course
from llmscale.stages.tuned import ABOUT_EXAMPLES
from llmscale.training.rounded_weights import Rounding
from llmscale.training.supervised import Supervised


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
    tuning.require_tokens(model, tokenizer)
    template = tuning.chosen_template(stage, tokenizer)
    if template is None:
        raise tuning.no_template(model)
    reading = _Reading(tokenizer, template, tuning.room(stage, model), workspace.seed, Intake())
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
    tuning.require_training((name, splits["train"]) for name, splits in sets.items())
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
    about = {
        "padding": tuning.padding_token(tokenizer),
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
    for own in sorted(made, key=lambda own: position(f"few {_text(own.example)}", seed)):
        if len(chosen[own.name]) < few.examples:
            chosen[own.name].append(own)
    return [own for each in chosen.values() for own in each]


def _text(example: Example) -> str:
    return example.tokens_n.tobytes().hex()


def split_examples(made: list[Classed], fraction: float, seed: int) -> dict[str, list[Classed]]:
    """Examples by split; equal ones fall on the same side."""
    return tuning.split(((_text(own.example), own) for own in made), fraction, seed)


def fine_tuning(stage: Finetune, workspace: Workspace) -> Course:
    """What a stage of fine-tuning trains."""
    model = workspace.inputs["start_from"]
    about = read_json(workspace.folder.path / ABOUT_EXAMPLES)
    form = tuning.row_form(stage, model, about["padding"], workspace.device)
    objective = Supervised(form, several=stage.packing)
    sources = {name: _samples(stage, workspace, name, "train") for name in stage.data}
    held_out = [
        _samples(stage, workspace, name, "validation")
        for name, counts in about["examples"].items()
        if counts["validation"]
    ]
    architecture = read_architecture(model)
    trained = tuning.tuned_model(stage, workspace.folder, model, architecture)
    trained = replace(trained, rounding=_rounding(stage, architecture))
    return tuning.tuned_course(stage, workspace, trained, objective, sources, held_out)


def _rounding(stage: Finetune, architecture: Architecture) -> Rounding | None:
    """To what weights are rounded while they learn; scales are as the exported model's numbers."""
    wanted = stage.quantization_aware
    if wanted is None:
        return None
    return Rounding(
        wanted.quantization().composition().weights,
        group_size(wanted, architecture),
        torch.float16 if stage.precision == "fp16" else torch.bfloat16,
    )


def _samples(stage: Finetune, workspace: Workspace, name: str, split: str) -> ExampleSamples:
    folder = workspace.folder.path / Path(ABOUT_EXAMPLES).parent
    examples = Examples.read(_file(folder, name, split))
    most = tuning.room(stage, workspace.inputs["start_from"])
    return ExampleSamples(examples, most, stage.packing, workspace.seed)
