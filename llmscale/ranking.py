"""The command ``rank``: the best of several answers to each prompt, by a reward model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmscale import runs
from llmscale.artifacts import write_text
from llmscale.data.records import Malformed, read_records
from llmscale.errors import RecipeError
from llmscale.models_at_hand import generation_settings


def rank(
    model: str,
    prompts: Path,
    rewards: Sequence[str],
    best_of: int,
    options: Mapping[str, Any],
    seed: int,
    out: Path | None,
) -> list[dict[str, Any]]:
    """Of each prompt its answers, the best first, with their scores.

    Several reward models are an ensemble: an answer's score is the mean of theirs, and
    ``spreads`` are their standard deviations (Coste et al. 2023). Of a model with several heads
    the score is the mean of them, too.

    Args:
        out: a file of rankings to be written, as stages of kind reward and dpo read them.

    Raises:
        RecipeError: if a model, the prompts or an option is wrong.
    """
    generation = generation_settings({"decoding": "sample", **options})
    asked = list(read_prompts(prompts))
    folders = [runs.model_folder(name) for name in (model, *rewards)]
    from llmscale.evaluation.generation import answers_or_continuations
    from llmscale.evaluation.models import load_model
    from llmscale.evaluation.reward_models import RewardModel

    policy, tokenizer = load_model(folders[0])
    judges = [RewardModel(folder) for folder in folders[1:]]
    ranked = []
    for number, prompt in enumerate(asked):
        answers, _ = answers_or_continuations(
            policy, tokenizer, prompt, generation, seed + number, several=best_of
        )
        scores_ja = np.stack(
            [
                judge.scores([judge.tokens(prompt, answer) for answer in answers]).mean(1)
                for judge in judges
            ]
        )
        ranked.append(_ranked(prompt, answers, scores_ja))
    if out is not None:
        write_text(out, "".join(json.dumps(one) + "\n" for one in ranked))
    return ranked


def _ranked(prompt: str, answers: Sequence[str], scores_ja: np.ndarray) -> dict[str, Any]:
    """Equal answers once; scores by judge and answer."""
    mean_a, spread_a = scores_ja.mean(0), scores_ja.std(0)
    first = {answer: number for number, answer in reversed(list(enumerate(answers)))}
    order = sorted(first.values(), key=lambda number: -mean_a[number])
    return {
        "prompt": prompt,
        "responses": [answers[number] for number in order],
        "scores": [float(mean_a[number]) for number in order],
        "spreads": [float(spread_a[number]) for number in order],
    }


def read_prompts(file: Path) -> Iterator[str]:
    """The prompts of a file: of records by their key ``prompt``, else a line each.

    Raises:
        RecipeError: if there is none, or a record is broken.
    """
    if not file.is_file():
        raise RecipeError(f"--prompts: {file} is no file; give one with a prompt a line")
    found = False
    if file.suffix in (".json", ".jsonl"):
        for record in read_records(file):
            if isinstance(record.value, Malformed):
                raise RecipeError(f"--prompts: {record.place}: {record.value}")
            prompt = record.value.get("prompt") if isinstance(record.value, dict) else None
            if not isinstance(prompt, str) or not prompt.strip():
                raise RecipeError(f"--prompts: {record.place}: has no prompt; give a text")
            found = True
            yield prompt
    else:
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.strip():
                found = True
                yield line
    if not found:
        raise RecipeError(f"--prompts: {file} is empty; give a prompt a line")
