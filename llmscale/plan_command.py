"""``llmscale plan``: recipes planned, published results predicted, constants refined."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from llmscale.artifacts import write_text
from llmscale.errors import RecipeError
from llmscale.learning_plans import plain_learning, plan_learning
from llmscale.plan_display import show_errors, show_learning, show_plan, show_reasons
from llmscale.planning.calibration import (
    calibrate,
    calibration_file,
    load_calibration,
    measured_seconds,
)
from llmscale.planning.constants import Constants
from llmscale.planning.explain import explain
from llmscale.planning.forecast import Forecast, forecast, layout, plain
from llmscale.planning.hardware import find_device
from llmscale.planning.validate import errors_by_source, validate, write_predictions
from llmscale.planning.validate import plain as plain_errors
from llmscale.plans import (
    StagePlan,
    constants_of,
    device_of,
    plan_recipe,
    planned_stages,
    setup_of,
)
from llmscale.recipe.recipe import Recipe, load_recipe
from llmscale.stages.trained import TrainedStage


def required(recipe: Path | None) -> Path:
    """The recipe that a call names.

    Raises:
        RecipeError: if it names none.
    """
    if recipe is None:
        raise RecipeError("llmscale plan: needs RECIPE, or --validate TABLE.csv")
    return recipe


def plan(
    recipe: Path,
    overrides: Sequence[str],
    *,
    gpu: str | None,
    gpus: int | None,
    price: float | None,
    why: bool,
    write: Path | None,
    calibration: str | None,
    console: Console,
) -> dict[str, Any]:
    """Plans a recipe's stages and prints a table of each.

    Args:
        price: of a GPU for an hour.
        write: where to write the recipe with the quickest layout that fits.
        calibration: the name of the constants to use; or else the device's.

    Raises:
        RecipeError: if the recipe or the call is wrong, or no layout fits that is to be written.
    """
    loaded = load_recipe(recipe, overrides)
    device = find_device(gpu) if gpu is not None else device_of(loaded)
    constants = constants_of(device, calibration)
    ranks = gpus or loaded.cluster.ranks
    plans = plan_recipe(loaded, device, ranks, constants)
    learned = plan_learning(loaded, device, ranks, constants)
    for stage in plans.values():
        show_plan(console, stage, price)
        if why:
            show_reasons(console, _explained(stage, constants), stage.found)
    for learning in learned.values():
        show_learning(console, learning, price)
    answer = {
        name: _plain(stage, price, constants if why else None) for name, stage in plans.items()
    } | {name: plain_learning(learning) for name, learning in learned.items()}
    if write is not None:
        write_text(write, _with_best_layouts(loaded, plans).to_yaml())
        console.print(f"wrote {write}", markup=False)
    return {"gpu": device.name, "gpus": ranks, "stages": answer}


def _explained(stage: StagePlan, constants: Constants) -> list[Any]:
    shown = stage.own or next(iter(stage.found.best), None)
    return explain(shown, constants) if shown is not None else []


def _plain(stage: StagePlan, price: float | None, constants: Constants | None) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "parameters": stage.parameters,
        "tokens": stage.tokens,
        "own": plain(stage.own, stage.tokens, price) if stage.own else None,
        "why_not": stage.why_not,
        "best": [plain(each, stage.tokens, price) for each in stage.found.best],
        "tried": stage.found.tried,
    }
    if constants is not None:
        answer["why"] = [reason._asdict() for reason in _explained(stage, constants)]
        answer["impossible"] = dict(stage.found.impossible.most_common())
    return answer


def _with_best_layouts(recipe: Recipe, plans: dict[str, StagePlan]) -> Recipe:
    """The recipe with each stage at its quickest layout that is sure to fit.

    Raises:
        RecipeError: if a stage has none.
    """
    if not plans:
        raise RecipeError(
            "--write: no other layouts are searched for a stage of kind ppo; write its parallel by "
            "hand"
        )
    stages = dict(recipe.stages)
    ranks = set()
    for name, stage in planned_stages(recipe).items():
        best = next((each for each in plans[name].found.best if _writable(stage, each)), None)
        if best is None:
            raise RecipeError(
                f"--write: no layout of stages.{name} is sure to fit; use more GPUs, or see --why"
            )
        ranks.add(best.setup.gpus)
        chosen = layout(best.setup)
        degrees = chosen.keys() & type(stage.parallel).model_fields.keys()
        layers = best.setup.layers_per_stage
        parallel = {key: chosen[key] for key in degrees} | {"layers_per_stage": layers}
        stages[name] = stage.model_copy(
            update={
                "parallel": stage.parallel.model_copy(update=parallel),
                "batch": stage.batch.model_copy(update={"micro": chosen["micro"]}),
                "optimizer": stage.optimizer.model_copy(
                    update={"distributed": chosen["sharding"] == "optimizer"}
                ),
                "recompute": chosen["recompute"],
            }
        )
    nodes, over = divmod(ranks.pop(), recipe.cluster.ranks_per_node)
    if over:
        raise RecipeError(
            f"--write: cluster.ranks_per_node {recipe.cluster.ranks_per_node} does not divide the "
            "GPUs; use a multiple of it for --gpus"
        )
    cluster = recipe.cluster.model_copy(update={"nodes": nodes})
    written = recipe.model_copy(update={"stages": stages, "cluster": cluster})
    for problem in written.problems():
        raise RecipeError(f"--write: {'.'.join(problem.path)}: {problem.message}")
    return written


def _writable(stage: TrainedStage, found: Forecast) -> bool:
    """Whether it is sure to fit, and in the recipe's own precision."""
    return found.verdict == "fits" and found.setup.precision == stage.precision


def validate_table(table: Path, out: Path | None, console: Console) -> dict[str, Any]:
    """Predicts each row of a table and prints the errors by source.

    Raises:
        RecipeError: if the file is no table of results.
    """
    columns, predicted = validate(table, Constants())
    found = errors_by_source(predicted)
    show_errors(console, found)
    if out is not None:
        write_predictions(out, columns, predicted)
        console.print(f"wrote {out}", markup=False)
    return {"table": str(table), "sources": plain_errors(found)}


def calibrate_by_run(
    recipe: Path,
    overrides: Sequence[str],
    metrics: Path,
    *,
    gpu: str | None,
    calibration: str | None,
    console: Console,
) -> dict[str, Any]:
    """Refines the constants by a measured run of a recipe, and saves them by name.

    Raises:
        RecipeError: if the recipe or the file is wrong, or the recipe trains in several stages.
    """
    loaded = load_recipe(recipe, overrides)
    stages = planned_stages(loaded)
    if len(stages) != 1:
        raise RecipeError(
            f"{recipe}: has {len(stages)} stages that train; calibrate by a recipe with one"
        )
    device = find_device(gpu) if gpu is not None else device_of(loaded)
    seconds, name = measured_seconds(metrics), calibration or device.name
    ranks = loaded.cluster.ranks
    setup = setup_of(loaded, next(iter(stages.values())), device.shared(ranks))
    before = forecast(setup, load_calibration(name))
    after = forecast(setup, calibrate(name, setup, seconds))
    console.print(
        f"measured {seconds:.4g} s a step, predicted {before.step.total:.4g} before and "
        f"{after.step.total:.4g} now; saved as {calibration_file(name)}",
        markup=False,
    )
    return {
        "calibration": name,
        "measured_seconds": seconds,
        "predicted_before": before.step.total,
        "predicted_now": after.step.total,
    }
