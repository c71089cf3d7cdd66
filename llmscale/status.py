"""How far a run is, from its folder alone: its stages, its jobs, a sweep's members."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from llmscale.artifacts import RunFolder
from llmscale.clusters.history import History
from llmscale.clusters.slurm.commands import JobState
from llmscale.clusters.slurm.jobs import Submitted, submitted_jobs
from llmscale.holder import Holder
from llmscale.progress import read_progress
from llmscale.recipe.recipe import Recipe, read_resolved
from llmscale.recipe.sweep import grid
from llmscale.runs import known_live_jobs, known_ray_job
from llmscale.settings import shown
from llmscale.stages.trained import TrainedStage


def status(folder: RunFolder) -> dict[str, Any]:
    """Who runs here, how far each stage is, and what happened on the way."""
    recipe = read_resolved(folder.recipe_file)
    holder, jobs = folder.holder(), known_live_jobs(folder)
    names = recipe.order() if recipe.sweep is None else common_stages(folder, recipe)
    history = History(folder.path)
    submitted, ray_job = submitted_jobs(folder), known_ray_job(folder)
    told = [{**asdict(job), **asdict(_state(job, jobs))} for job in submitted]
    running = _in_words(submitted, jobs)
    if ray_job is not None:
        told.append(asdict(ray_job))
        running = str(ray_job)
    live = bool(jobs) or (ray_job is not None and ray_job.live)
    return {
        "run": folder.place,
        "recipe": recipe.name,
        "running": running or (None if holder is None else str(holder)),
        "jobs": told,
        "bad_nodes": history.bad_nodes(),
        "events": history.mishaps(),
        "stages": [_stage(folder, recipe, name, holder, live) for name in names],
        **({} if recipe.sweep is None else {"sweep": members(folder, recipe, jobs)}),
    }


def _stage(
    folder: RunFolder,
    recipe: Recipe,
    name: str,
    holder: Holder | None,
    queued: bool,
) -> dict[str, Any]:
    stage = folder.stage(name)
    manifest = stage.manifest()
    state = manifest.get("status", "waiting")
    if state == "running" and holder is None:
        state = "queued" if queued else "interrupted"
    return {
        "stage": name,
        "kind": recipe.stages[name].kind,
        "status": state,
        "progress": read_progress(stage.progress_file) if state == "running" else None,
        "error": manifest.get("error"),
        "metrics": manifest.get("metrics", {}),
    }


def _in_words(submitted: Iterable[Submitted], jobs: Mapping[str, JobState]) -> str:
    """The jobs that live; of an array, how many members are in which state."""
    words = []
    for job in submitted:
        own = [state for name, state in jobs.items() if job.member_of(name) is not None]
        if own:
            counts = Counter(state.state for state in own)
            told = ", ".join(f"{count} {state}" for state, count in counts.items())
            words.append(f"job {job.job} ({told})")
        elif job.job in jobs:
            words.append(f"job {job.job} ({jobs[job.job]})")
    return ", ".join(words)


def _state(job: Submitted, jobs: Mapping[str, JobState]) -> JobState:
    """A job's state; of an array, that of a member at work, else of one that waits."""
    own = [state for name, state in jobs.items() if job.member_of(name) is not None]
    own.sort(key=lambda state: state.waiting)
    return jobs.get(job.job, own[0] if own else JobState(""))


def common_stages(folder: RunFolder, recipe: Recipe) -> list[str]:
    """The stages that a sweep's members have in common: the members hold links to them."""
    first = folder.member("000")
    return [name for name in recipe.order() if first.stage(name).path.is_symlink()]


def members(
    folder: RunFolder, recipe: Recipe, jobs: Mapping[str, JobState]
) -> list[dict[str, Any]]:
    """How far each member of a sweep is.

    Args:
        jobs: those of the sweep that SLURM still has.
    """
    states: dict[str, dict[str, JobState]] = {}
    for array in submitted_jobs(folder):
        for job, state in jobs.items():
            if (number := array.member_of(job)) is not None:
                states.setdefault(number, {})[job] = state
    return [
        {"member": number, "values": values}
        | _member(folder.member(number), recipe, states.get(number, {}))
        for number, values in grid(recipe.sweep or {}).items()
    ]


def _member(folder: RunFolder, recipe: Recipe, jobs: Mapping[str, JobState]) -> dict[str, Any]:
    holder = folder.holder() if folder.path.is_dir() else None
    stages = [_stage(folder, recipe, name, holder, bool(jobs)) for name in recipe.order()]
    own = [told for told in stages if not folder.stage(told["stage"]).path.is_symlink()]
    trained = [told for told in stages if isinstance(recipe.stages[told["stage"]], TrainedStage)]
    metrics = trained[-1]["metrics"] if trained else {}
    return {
        "status": _member_status(stages, own, holder, jobs),
        "run": str(folder.path),
        "error": next((told["error"] for told in own if told["status"] == "failed"), None),
        "metrics": {name: value for name, value in metrics.items() if "loss" in name},
    }


def _member_status(
    stages: list[dict[str, Any]],
    own: list[dict[str, Any]],
    holder: Holder | None,
    jobs: Mapping[str, JobState],
) -> str:
    if all(told["status"] == "finished" for told in stages):
        return "finished"
    if holder is not None or any(not state.waiting for state in jobs.values()):
        return "running"
    if jobs:
        return "queued"
    found = {told["status"] for told in own}
    return next((status for status in ("failed", "interrupted") if status in found), "waiting")


def member_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The members of a sweep as a table for people."""
    if not rows:
        return []
    keys, figures = list(rows[0]["values"]), dict.fromkeys(n for r in rows for n in r["metrics"])
    last = Counter(key.rpartition(".")[2] for key in keys)
    short = [key.rpartition(".")[2] if last[key.rpartition(".")[2]] == 1 else key for key in keys]
    table = [["member", *short, "status", *figures, ""]]
    for row in rows:
        told = [_figure(row["metrics"].get(figure)) for figure in figures]
        values = [shown(value, most=40) for value in row["values"].values()]
        table.append([row["member"], *values, row["status"], *told, row["error"] or ""])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  " + "  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
