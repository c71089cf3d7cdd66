"""Prompts as tokens on disk: made once, before a policy answers them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from llmscale.artifacts import new_folder, write_json
from llmscale.data.chat import end_of_answer, prompt_text
from llmscale.data.prompts import Prompt, asked, first_words, write_prompts
from llmscale.data.records import Intake, Malformed
from llmscale.data.tokenizer import load_tokenizer
from llmscale.stages import tuning
from llmscale.stages.base import Workspace
from llmscale.stages.ppo import Ppo
from llmscale.stages.ppo_settings import Prompts
from llmscale.stages.tuned import ABOUT_EXAMPLES


@dataclass(frozen=True)
class _Reading:
    """How records become prompts."""

    tokenizer: Any
    template: str | None
    most: int
    intake: Intake

    def prompts(self, one: Prompts, on_file: Callable[[Path], None]) -> list[Prompt]:
        """Those of a data set that can be used."""
        made: list[Prompt] = []
        for file in one.files():
            on_file(file)
            make = partial(self._prompt, one.first_words)
            made += [prompt for _, prompt in self.intake.made(make, file)]
        return made

    def _prompt(self, words: int | None, record: dict[str, Any]) -> Prompt:
        """A question is asked by the chat template, if there is one; else it is as it stands."""
        if words is not None:
            text = written = first_words(record, words)
        else:
            turns = asked(record)
            text = written = turns[-1].content
            if self.template is not None:
                written = prompt_text(turns, self.tokenizer, self.template)
            elif len(turns) > 1:
                raise Malformed("several turns", "the model has no chat template")
        tokens = self.tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) > self.most:
            raise Malformed(
                "longer than the sequence",
                f"{len(tokens)} tokens and an answer are above it; at most {self.most} leave room",
            )
        return Prompt(text, tuple(tokens), words is not None)


def make_prompts(stage: Ppo, workspace: Workspace) -> None:
    """Writes ``examples/NAME/train.jsonl`` and ``.../validation.jsonl`` of each data set.

    Raises:
        RecipeError: if a record is malformed and that is refused, or none is left to answer.
    """
    model = workspace.inputs["start_from"]
    tokenizer = load_tokenizer(model)
    tuning.require_tokens(model, tokenizer)
    template = tuning.chosen_template(stage, tokenizer)
    most = tuning.room(stage, model) - stage.rollout.max_new_tokens
    reading = _Reading(tokenizer, template, most, Intake())
    files, done = sum(len(one.files()) for one in stage.data.values()), count()
    sets = {}
    for name, one in stage.data.items():
        prompts = reading.prompts(
            one, lambda file: workspace.progress.update(next(done), files, "files", file.name)
        )
        texts = ((prompt.text, prompt) for prompt in prompts)
        sets[name] = tuning.split(texts, stage.validation_fraction, workspace.seed)
    folder = workspace.folder
    folder.path.mkdir(parents=True, exist_ok=True)
    reading.intake.close(folder.path, stage.malformed, f"stages.{folder.path.name}.malformed")
    tuning.require_training((name, splits["train"]) for name, splits in sets.items())
    counts = {
        name: {split: len(own) for split, own in splits.items()} for name, splits in sets.items()
    }
    about = {
        "padding": tuning.padding_token(tokenizer),
        "template": template,
        "ends": _ends(tokenizer, template),
        "examples": counts,
    }
    with new_folder(folder.path / Path(ABOUT_EXAMPLES).parent) as beside:
        for name, splits in sets.items():
            (beside / name).mkdir()
            for split, own in splits.items():
                write_prompts(own, beside / name / f"{split}.jsonl")
        write_json(beside / Path(ABOUT_EXAMPLES).name, about)
    folder.add_metrics(prompts=counts, malformed=reading.intake.counts())


def _ends(tokenizer: Any, template: str | None) -> list[int]:
    """The tokens that end an answer: the one that ends a text, and the template's, if it is one."""
    ends = [int(tokenizer.eos_token_id)]
    if template is not None and (sign := end_of_answer(tokenizer, template)):
        tokens = tokenizer(sign, add_special_tokens=False)["input_ids"]
        if len(tokens) == 1 and tokens[0] not in ends:
            ends.append(int(tokens[0]))
    return ends
