"""Judgements as groups of texts on disk: made once, before training starts."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from llmscale.artifacts import new_folder, read_json, write_json
from llmscale.data.chat import Example, encoded_conversation, encoded_text
from llmscale.data.groups import Group, Groups, GroupSamples, write_groups
from llmscale.data.judgements import (
    Contradictions,
    FormName,
    Judgement,
    Response,
    judgement,
    require_form,
)
from llmscale.data.records import Intake, Malformed
from llmscale.data.split import position
from llmscale.data.tokenizer import load_tokenizer
from llmscale.stages import tuning
from llmscale.stages.base import Workspace
from llmscale.stages.judged import Compare, JudgedData, JudgedStage
from llmscale.stages.tuned import ABOUT_EXAMPLES

JudgedKind = TypeVar("JudgedKind", bound=JudgedStage)


@dataclass(frozen=True)
class Encoder:
    """Responses as tokens: with a prompt by the chat template, else as they are, to their end."""

    model: Path
    tokenizer: Any
    template: str | None
    most: int

    def example(self, response: Response) -> Example:
        """The tokens; those of the answer are learned.

        Raises:
            Malformed: if they are too many.
            RecipeError: if there is a prompt and no template.
        """
        if not response.turns:
            example = encoded_text(response.text, self.tokenizer)
        elif self.template is None:
            raise tuning.no_template(self.model)
        else:
            example = encoded_conversation(
                response.turns, self.tokenizer, self.template, last_alone=True
            )
        if len(example) > self.most:
            raise Malformed("longer than the sequence", f"{len(example)} tokens, above {self.most}")
        return example


@dataclass(frozen=True)
class Encoded:
    """A judgement and the tokens of its responses."""

    judgement: Judgement
    texts: tuple[Example, ...]

    @property
    def prompt(self) -> str:
        """What was answered; equal for answers to one prompt."""
        return self.judgement.responses[0].prompt

    @property
    def leaks_by(self) -> str:
        """What must not be on both sides of a split: the prompt, or without one the texts."""
        return self.prompt or "\n".join(one.answer for one in self.judgement.responses)


GroupsOf = Callable[[Sequence[Encoded], Encoder], Iterator[Group]]
"""Makes the groups that a stage learns from out of the judgements of one split."""


@dataclass(frozen=True)
class _Reading:
    """How records become judgements."""

    encoder: Encoder
    forms: Sequence[FormName]
    intake: Intake

    def judgements(self, one: JudgedData, on_file: Callable[[Path], None]) -> list[Encoded]:
        """Those of a data set that can be used."""
        made: list[Encoded] = []
        contradictions = Contradictions()
        for file in one.files():
            on_file(file)
            for place, read in self.intake.made(lambda record: self._encoded(record, one), file):
                try:
                    contradictions.check(place, read.judgement)
                except Malformed as problem:
                    self.intake.refuse(place, problem)
                else:
                    made.append(read)
        return made

    def _encoded(self, record: dict[str, Any], one: JudgedData) -> Encoded:
        made = judgement(record)
        require_form(made, ("scores",) if one.compare else self.forms)
        if one.score_range is not None and not math.isnan(made.target):
            low, high = one.score_range
            if not low <= made.target <= high:
                raise Malformed("score out of range", f"{made.target}, not in [{low}, {high}]")
        return Encoded(made, tuple(self.encoder.example(each) for each in made.responses))


def make_groups(
    stage: JudgedKind,
    workspace: Workspace,
    forms: Sequence[FormName],
    groups_of: Callable[[JudgedKind, Sequence[Encoded], Encoder], Iterator[Group]],
) -> None:
    """Writes ``examples/NAME/train.safetensors`` and ``.../validation...`` of each data set.

    Args:
        forms: of judgements that the stage can learn from.
        groups_of: the groups it learns from, out of the judgements of one split.

    Raises:
        RecipeError: if a record is malformed and that is refused, or none is left to train on.
    """
    model = workspace.inputs["start_from"]
    tokenizer = load_tokenizer(model)
    tuning.require_tokens(model, tokenizer)
    template = tuning.chosen_template(stage, tokenizer)
    encoder = Encoder(model, tokenizer, template, tuning.room(stage, model))
    reading = _Reading(encoder, forms, Intake())
    files, done = sum(len(one.files()) for one in stage.data.values()), count()
    sets: dict[str, dict[str, list[Group]]] = {}
    for name, one in stage.data.items():
        read = reading.judgements(
            one, lambda file: workspace.progress.update(next(done), files, "files", file.name)
        )
        keyed = ((encoded.leaks_by, encoded) for encoded in read)
        made = tuning.split(keyed, stage.validation_fraction, workspace.seed)
        sets[name] = {
            split: list(groups_of(stage, compared(part, one.compare, workspace.seed), encoder))
            for split, part in made.items()
        }
    folder = workspace.folder
    folder.path.mkdir(parents=True, exist_ok=True)
    reading.intake.close(folder.path, stage.malformed, f"stages.{folder.path.name}.malformed")
    tuning.require_training((name, splits["train"]) for name, splits in sets.items())
    about = {
        "padding": tuning.padding_token(tokenizer),
        "template": template,
        "examples": {
            name: {split: len(groups) for split, groups in splits.items()}
            for name, splits in sets.items()
        },
    }
    with new_folder(folder.path / Path(ABOUT_EXAMPLES).parent) as beside:
        for name, splits in sets.items():
            (beside / name).mkdir()
            for split, groups in splits.items():
                write_groups(groups, groups_file(beside, name, split))
        write_json(beside / Path(ABOUT_EXAMPLES).name, about)
    folder.add_metrics(examples=about["examples"], malformed=reading.intake.counts())


def compared(scored: Sequence[Encoded], how: Compare | None, seed: int) -> Sequence[Encoded]:
    """Pairs of scored responses to one prompt, the better first; the same for the same seed."""
    if how is None:
        return scored
    by_prompt: defaultdict[str, list[Encoded]] = defaultdict(list)
    for one in sorted(scored, key=lambda one: position(f"pair {one.leaks_by}", seed)):
        by_prompt[one.prompt].append(one)
    return [pair for answers in by_prompt.values() for pair in _pairs(answers, how)]


def _pairs(answers: Sequence[Encoded], how: Compare) -> Iterator[Encoded]:
    """Each answer beside the next ones, around the circle, that differ enough from it."""
    found: set[frozenset[int]] = set()
    for number, one in enumerate(answers):
        wanted = how.pairs_each
        for step in range(1, len(answers)):
            if wanted == 0:
                break
            other = (number + step) % len(answers)
            pair = sorted((one, answers[other]), key=lambda each: -each.judgement.target)
            apart = pair[0].judgement.target - pair[1].judgement.target
            if apart < how.difference or frozenset((number, other)) in found:
                continue
            found.add(frozenset((number, other)))
            wanted -= 1
            better, worse = pair
            responses = (*better.judgement.responses, *worse.judgement.responses)
            yield Encoded(Judgement("pairs", responses), (*better.texts, *worse.texts))


def groups_file(folder: Path, name: str, split: str) -> Path:
    """Where a data set's groups are, in the folder of examples."""
    return folder / name / f"{split}.safetensors"


def about_groups(workspace: Workspace) -> dict[str, Any]:
    """What ``make_groups`` says of them: padding, template, and how many there are."""
    about: dict[str, Any] = read_json(workspace.folder.path / ABOUT_EXAMPLES)
    return about


def group_samples(
    stage: JudgedStage,
    workspace: Workspace,
    split: str,
    read: Callable[[str, Path], Groups],
) -> dict[str, GroupSamples]:
    """The samples of each data set that has some in a split."""
    folder = workspace.folder.path / Path(ABOUT_EXAMPLES).parent
    counts = about_groups(workspace)["examples"]
    return {
        name: GroupSamples(read(name, groups_file(folder, name, split)), workspace.seed)
        for name in stage.data
        if counts[name][split]
    }
