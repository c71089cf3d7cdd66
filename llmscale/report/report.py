"""One self-contained HTML page of a run: figures, lineage, plots, samples, recipe, versions.

The page is a function of the run's folder alone: it holds no time but the stages' own, so
writing it again changes nothing. All that a run produced is untrusted text and is escaped.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from llmscale.artifacts import RunFolder, read_json, write_text
from llmscale.recipe.recipe import Recipe, read_resolved
from llmscale.report.answers import ShownPrompt, extreme_answers, held_out_answers
from llmscale.report.comparisons import Comparison, comparison_plot, comparison_table
from llmscale.report.evaluations import (
    Confusion,
    confusions,
    reliability_plots,
    without_drawn,
)
from llmscale.report.plots import Plot, Record, plots, series
from llmscale.stages.base import Stage
from llmscale.stages.compare import COMPARISON
from llmscale.stages.ppo import SAMPLES, VALIDATION_ANSWERS
from llmscale.status import status

NOTHING = "–"


@dataclass(frozen=True)
class Headline:
    """A figure that sums up the run, and the stage it is from."""

    label: str
    value: str
    stage: str


@dataclass(frozen=True)
class StageView:
    """All that the page tells of one stage."""

    name: str
    kind: str
    status: str
    error: str
    progress: str
    inputs: str
    fingerprint: str
    started: str
    finished: str
    duration: str
    metrics: Sequence[tuple[str, str]]
    plots: Sequence[Plot]
    reliability: Sequence[Plot]
    comparison: Comparison | None
    comparison_plot: Plot | None
    confusions: Sequence[Confusion]
    samples: Sequence[Mapping[str, str]]
    held_out: Sequence[ShownPrompt]
    extremes: Sequence[ShownPrompt]


def write_report(folder: RunFolder) -> Path:
    """Writes ``report.html`` into a run's folder; the run may be at any point.

    Raises:
        RecipeError: if it is no run's folder, or its recipe cannot be read.
        OSError: if the page cannot be written; an older one stays.
    """
    recipe = read_resolved(folder.recipe_file)
    state = status(folder)
    manifests = {name: folder.stage(name).manifest() for name in recipe.order()}
    records = {name: folder.stage(name).metrics() for name in recipe.order()}
    page = _environment().get_template("report.html")
    text = page.render(
        name=recipe.name,
        status=_run_status([stage["status"] for stage in state["stages"]]),
        when=_when(manifests.values(), state["stages"]),
        headlines=_headlines(state["stages"], records),
        stages=[
            _stage_view(folder, recipe, told, manifests, records[told["stage"]])
            for told in state["stages"]
        ],
        recipe=folder.recipe_file.read_text(encoding="utf-8"),
        versions=_versions(manifests),
    )
    write_text(folder.report_file, text)
    return folder.report_file


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("llmscale", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = format_value
    return environment


def _run_status(statuses: Sequence[str]) -> str:
    for decisive in ("failed", "interrupted", "running"):
        if decisive in statuses:
            return decisive
    if "waiting" not in statuses:
        return "finished"
    return "unfinished" if "finished" in statuses else "not begun"


def _when(manifests: Iterable[Record], stages: Sequence[Record]) -> str:
    begun = [manifest for manifest in manifests if manifest.get("started")]
    if not begun:
        return "no stage has begun"
    first = format_time(min(manifest["started"] for manifest in begun))
    if any(stage["status"] != "finished" for stage in stages):
        return f"begun {first} UTC"
    return f"{first} to {format_time(max(manifest['finished'] for manifest in begun))} UTC"


def _headlines(stages: Sequence[Record], records: Mapping[str, Sequence[Record]]) -> list[Headline]:
    logged = [
        ("validation loss", "validation_loss", _last),
        ("held-out reward", "validation_reward", _last),
        ("tokens seen", "tokens", _last),
        ("tokens/s, median", "tokens_per_second", _median),
        ("MFU, median", "mfu", _median_percent),
    ]
    told = [
        ("validation loss", "validation_loss"),
        ("perplexity", "perplexity"),
        ("bits per byte", "bits_per_byte"),
        ("parameters", "parameters"),
        ("tokens seen", "tokens_seen"),
    ]
    found: dict[str, Headline] = {label: Headline(label, "", "") for label, _ in told}
    for stage in stages:
        name = stage["stage"]
        for label, key, summary in logged:
            values = [value for _, value in series(records[name], key)]
            if values:
                found[label] = Headline(label, summary(values), name)
        for label, key in told:
            if stage["metrics"].get(key) is not None:
                found[label] = Headline(label, format_briefly(stage["metrics"][key]), name)
    return [headline for headline in found.values() if headline.value]


def _last(values: Sequence[float]) -> str:
    return format_briefly(values[-1])


def _median(values: Sequence[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return format_briefly(median(finite)) if finite else NOTHING


def _median_percent(values: Sequence[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return f"{median(finite):.1%}" if finite else NOTHING


def _stage_view(
    folder: RunFolder,
    recipe: Recipe,
    told: Record,
    manifests: Mapping[str, Record],
    records: Sequence[Record],
) -> StageView:
    name = told["stage"]
    manifest, place = manifests[name], folder.stage(name).path
    started, finished = manifest.get("started"), manifest.get("finished")
    compared = read_json(place / COMPARISON) or []
    answering = told["kind"] == "ppo"
    return StageView(
        name=name,
        kind=told["kind"],
        status=told["status"],
        error=told["error"] or "",
        progress=_progress(told["progress"]),
        inputs=_inputs(recipe.stages[name], recipe, manifests, name),
        fingerprint=manifest.get("fingerprint", "")[:12] or NOTHING,
        started=format_time(started) if started else NOTHING,
        finished=format_time(finished) if finished else NOTHING,
        duration=format_duration(started, finished) if started and finished else NOTHING,
        metrics=[
            (key, format_value(value))
            for key, value in flatten({} if compared else without_drawn(told["metrics"]))
        ],
        plots=plots(name, records),
        reliability=reliability_plots(name, told["metrics"]),
        comparison=comparison_table(compared) if compared else None,
        comparison_plot=comparison_plot(name, compared) if compared else None,
        confusions=confusions(told["metrics"]),
        samples=read_json(place / "samples.json") or [],
        held_out=held_out_answers(place / VALIDATION_ANSWERS) if answering else [],
        extremes=extreme_answers(place / SAMPLES) if answering else [],
    )


def _progress(progress: Record | None) -> str:
    if progress is None:
        return ""
    done = f"{progress['done']:,} of {progress['total']:,} {progress['unit']}"
    return f"{done}; {progress['text']}" if progress["text"] else done


def _inputs(stage: Stage, recipe: Recipe, manifests: Mapping[str, Record], name: str) -> str:
    """The stages and folders a stage reads; those that changed since it ran are marked."""
    named = {each.key: each.name for each in stage.named()} | stage.linked(recipe.stages)
    used = manifests[name].get("inputs", {})
    words = []
    for key, target in named.items():
        was = used.get(key, {}).get("fingerprint")
        now = manifests.get(target, {}).get("fingerprint")
        words.append(f"{target} (changed since)" if was and now and was != now else target)
    return ", ".join(dict.fromkeys(words)) or NOTHING


def _versions(manifests: Mapping[str, Record]) -> list[tuple[str, str]]:
    """Each package's version; the stages are named where they ran with different ones."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, manifest in manifests.items():
        for package, version in manifest.get("versions", {}).items():
            found.setdefault(package, {}).setdefault(version, []).append(name)
    return [
        (
            package,
            next(iter(stages))
            if len(stages) == 1
            else "; ".join(f"{version} ({', '.join(of)})" for version, of in stages.items()),
        )
        for package, stages in found.items()
    ]


def format_time(moment: str) -> str:
    """An ISO 8601 time in UTC, for people."""
    return datetime.fromisoformat(moment).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def format_duration(started: str, finished: str) -> str:
    """The time between two ISO 8601 times, in its two largest units."""
    elapsed = datetime.fromisoformat(finished) - datetime.fromisoformat(started)
    minutes, seconds = divmod(int(elapsed.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    while len(parts) > 1 and parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{number} {unit}" for number, unit in parts[:2])


def format_value(value: Any) -> str:
    """A metric for people: digits grouped, four significant ones after the point."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return {"nan": "NaN", "inf": "∞", "-inf": "−∞"}[str(value)]
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(format_value(item) for item in value)
    return str(value)


def format_briefly(value: Any) -> str:
    """A metric as a headline: large numbers in millions, billions or trillions."""
    if isinstance(value, int | float):
        for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
            if scale <= abs(value) < math.inf:
                return f"{value / scale:.4g} {letter}"
    return format_value(value)


def flatten(values: Record, before: str = "") -> Iterable[tuple[str, Any]]:
    """Nested metrics as rows, each named by its keys in words."""
    for key, value in values.items():
        label = f"{before}{key}".replace("_", " ")
        if isinstance(value, dict):
            yield from flatten(value, f"{label}, ")
        else:
            yield label, value
