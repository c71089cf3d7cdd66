"""The commands that take a model: generate, export, import. They import torch."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmscale import runs
from llmscale.errors import RecipeError
from llmscale.evaluation.generation import Generation, answers_or_continuations
from llmscale.recipe.explain import explain
from llmscale.recipe.recipe import read_resolved
from llmscale.stages.pretrain import FIRST_WEIGHTS
from llmscale.stages.trained import TrainedStage


def generate_text(
    model: str, prompt: str, settings: Mapping[str, Any], seed: int, raw: bool
) -> tuple[str, bool]:
    """The model's continuation of a prompt, or its answer, and whether it is one.

    Args:
        raw: leave the model's chat template out, if it has one.

    Raises:
        RecipeError: if the model or a setting is wrong.
    """
    generation = generation_settings(settings)
    folder = runs.model_folder(model)
    from llmscale.evaluation.models import load_model

    texts, answered = answers_or_continuations(*load_model(folder), prompt, generation, seed, raw)
    return texts[0], answered


def generation_settings(options: Mapping[str, Any]) -> Generation:
    """How to generate, as the command's options say it.

    Raises:
        RecipeError: names the option that is wrong.
    """
    try:
        return Generation(**options)
    except ValidationError as error:
        path, message = explain(error, Generation)
        raise RecipeError(f"--{'-'.join(path).replace('_', '-')}: {message}") from None


def import_model(source: Path, target: Path) -> int:
    """Makes an import of a Hugging Face folder, or such a folder of a GGUF file.

    Returns:
        The number of parameters.

    Raises:
        RecipeError: if the folder cannot be imported.
    """
    _new(target)
    if source.is_file() and source.suffix == ".gguf":
        import llmscale.quiet
        from llmscale.models.gguf import gguf_to_folder

        return gguf_to_folder(source, target)
    runs.model_folder(str(source))
    import llmscale.quiet  # noqa: F401
    from llmscale.stages.imported import import_huggingface

    return import_huggingface(source, target)


def export(run_stage: str, target: Path) -> dict[str, Any]:
    """Writes the best checkpoint of a training stage as a Hugging Face folder.

    Raises:
        RecipeError: if there is no such stage, or no whole checkpoint in it.
    """
    _new(target)
    parts = runs.split_model(run_stage)
    folder = runs.open_run(parts[0] if parts else run_stage)
    recipe = read_resolved(folder.recipe_file)
    training = [name for name, stage in recipe.stages.items() if isinstance(stage, TrainedStage)]
    name = parts[1] if parts else (training[-1] if training else "")
    stage = recipe.stages.get(name)
    if not isinstance(stage, TrainedStage):
        known = ", ".join(training) or "none"
        raise RecipeError(f"{run_stage}: {name!r} is no training stage; there are: {known}")
    for key, linked in stage.linked(recipe.stages).items():
        if key in ("tokenizer", "start_from"):
            folder.pull(f"{linked}/{recipe.stages[linked].product}")
    folder.pull(f"{name}/{stage.about}", f"{name}/{FIRST_WEIGHTS}")
    import llmscale.quiet  # noqa: F401
    from llmscale.rank import input_folders
    from llmscale.stages.train_rank import export_at_one_rank
    from llmscale.stages.trained_models import trained_model

    own, inputs = folder.stage(name), input_folders(recipe, stage, folder)
    trained, start_from = trained_model(stage, own, inputs)
    with tempfile.TemporaryDirectory() as meeting:
        step = export_at_one_rank(
            stage,
            trained,
            start_from,
            folder=own,
            target=target,
            rendezvous=f"file://{meeting}/store",
        )
    return {"out": str(target), "stage": name, "step": step}


def _new(target: Path) -> None:
    if target.exists():
        raise RecipeError(f"--out: {target} exists; choose a new folder")
