"""Classification as a page shows it: a reliability plot, and how labels were confused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmscale.report.plots import GRID, LINE, POINTS, Plot, drawing

SQUARE_INCHES = (3.6, 3.2)
DRAWN_APART = ("reliability", "confusion")
"""Figures that are pictures and tables, and no rows of numbers."""


@dataclass(frozen=True)
class Confusion:
    """A table: a row a label that texts have, a column a label that was answered."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


def without_drawn(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's metrics without those that are drawn."""
    labelled = {
        name: {key: value for key, value in own.items() if key not in DRAWN_APART}
        for name, own in metrics.get("classification", {}).items()
    }
    return {**metrics, "classification": labelled} if labelled else dict(metrics)


def confusions(metrics: Mapping[str, Any]) -> list[Confusion]:
    """A table for each classification."""
    return [
        Confusion(
            name,
            list(next(iter(own["confusion"].values()))),
            [
                (label, [f"{count:,}" for count in counts.values()])
                for label, counts in own["confusion"].items()
            ],
        )
        for name, own in metrics.get("classification", {}).items()
    ]


def reliability_plots(stage: str, metrics: Mapping[str, Any]) -> list[Plot]:
    """A plot for each classification that knows how sure the model is."""
    return [
        _reliability(stage, name, own)
        for name, own in metrics.get("classification", {}).items()
        if own.get("reliability")
    ]


def _reliability(stage: str, name: str, figures: Mapping[str, Any]) -> Plot:
    bins = figures["reliability"]
    most = max(one["samples"] for one in bins)

    def paint(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=GRID, linewidth=1.0, linestyle="--")
        axes.plot(
            [one["confidence"] for one in bins],
            [one["accuracy"] for one in bins],
            color=LINE,
            linewidth=1.3,
        )
        axes.scatter(
            [one["confidence"] for one in bins],
            [one["accuracy"] for one in bins],
            s=[12 + 60 * one["samples"] / most for one in bins],
            color=POINTS,
            zorder=3,
        )
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)

    note = (
        f"Calibration error {figures['calibration_error']:.4f} over {figures['texts']:,} texts. "
        "Larger points stand for more of them; on the dashed line confidence is right."
    )
    svg = drawing(f"{stage}-{name}-reliability", paint, SQUARE_INCHES)
    return Plot(f"Reliability of {name}", svg, note)
