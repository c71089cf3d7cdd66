"""Judged texts for a small model, and what a plain loop makes of them."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from llmscale.artifacts import RunFolder, read_json
from llmscale.data.groups import Group
from llmscale.progress import Progress
from llmscale.recipe.recipe import load_recipe
from llmscale.stages.base import Workspace
from tests.models_on_disk import WORDS, small_llama

STEPS, LEARNING_RATE, CLIP, EPSILON = 4, 3e-3, 0.5, 1e-5
Curve = list[tuple[float, float]]


def judged_home(folder: Path, stage: str) -> Path:
    """A folder with a model, judgements in all forms, and a recipe of one stage, ``judged``."""
    small_llama(folder / "base")
    words, lot = WORDS.split(), random.Random(0)

    def said(most: int) -> str:
        return " ".join(lot.choices(words, k=lot.randint(1, most)))

    def different(many: int) -> list[str]:
        return [f"{said(3)} {number}" for number in range(many)]

    def write(name: str, records: list[dict[str, Any]]) -> None:
        (folder / name).write_text("\n".join(map(json.dumps, records)))

    pairs = []
    for number in range(40):
        chosen, rejected = different(2)
        margin = lot.choice([0, 0.5])
        pairs.append(
            {
                "prompt": f"{said(3)} {number}",
                "chosen": chosen,
                "rejected": rejected,
                "margin": margin,
            }
        )
    write("pairs.jsonl", pairs)
    write(
        "rankings.jsonl",
        [
            {"prompt": f"{said(2)} {number}", "responses": different(lot.choice([2, 3, 4]))}
            for number in range(20)
        ],
    )
    write(
        "scores.jsonl",
        [{"response": f"{said(4)} {number}", "score": lot.uniform(-4, 4)} for number in range(40)],
    )
    write(
        "labels.jsonl",
        [
            {"prompt": f"{said(2)} {number}", "response": said(3), "label": lot.random() < 0.5}
            for number in range(40)
        ],
    )
    (folder / "recipe.yaml").write_text(
        f"""
name: judged
seed: 7
cluster: {{on: local, device: cpu}}
stages:
  judged:
    start_from: base
    template: chatml
    validation_fraction: 0.2
    batch: {{global: 8, micro: 2}}
    optimizer:
      {{learning_rate: {LEARNING_RATE}, schedule: constant, gradient_clip: {CLIP},
       epsilon: {EPSILON}}}
    steps: {STEPS}
    checkpoint: {{every: 2}}
{stage}
"""
    )
    return folder


def steps_of(home: Path, run: RunFolder, course: Callable[..., Any], *overrides: str) -> Any:
    """The groups of each step, in the stage's own order."""
    recipe = load_recipe(home / "recipe.yaml", overrides)
    folder = run.stage("judged")
    inputs = {"start_from": home / "base"}
    workspace = Workspace(folder, inputs, recipe.seed, "cpu", Progress(folder.progress_file))
    samples = course(recipe.stages["judged"], workspace).data.phases[0]
    return [samples.samples(range(8 * step, 8 * step + 8)) for step in range(STEPS)]


def trained_alone(
    parameters: Sequence[torch.nn.Parameter],
    steps: Sequence[Sequence[Group]],
    losses: Callable[[Sequence[Group]], torch.Tensor],
) -> Curve:
    """Loss and gradient norm of each step in one process.

    Args:
        losses: of each of a step's groups.
    """
    decayed = [one for one in parameters if one.ndim > 1]
    others = [one for one in parameters if one.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        eps=EPSILON,
    )
    curve = []
    for groups in steps:
        optimizer.zero_grad()
        loss = losses(groups).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(parameters), CLIP)
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve


def logged(run: RunFolder) -> Curve:
    """Loss and gradient norm of each step of a run."""
    lines = run.stage("judged").metrics()
    return [(line["loss"], line["gradient_norm"]) for line in lines if "loss" in line]


def _megatron(ranks: int, parallel: str) -> list[str]:
    return [f"cluster.ranks_per_node={ranks}", f"stages.judged.parallel={parallel}"]


def _zero(stage: int) -> list[str]:
    engine = ["stages.judged.engine=deepspeed", f"stages.judged.zero={{stage: {stage}}}"]
    return ["cluster.ranks_per_node=2", *engine]


LAYOUTS: dict[str, list[str]] = {
    "one rank": ["cluster.ranks_per_node=1"],
    "tensor 2": _megatron(2, "{tensor: 2, sequence: true}"),
    "data 2": _megatron(2, "{data: 2}"),
    "tensor 2, pipeline 2": _megatron(4, "{tensor: 2, pipeline: 2}"),
    "ZeRO 1": _zero(1),
    "ZeRO 2": _zero(2),
    "ZeRO 3": _zero(3),
}


def about(run: RunFolder, name: str) -> Any:
    """A JSON file of the stage."""
    return read_json(run.stage("judged").path / name)
