"""Schemes of quantization as a page shows them: a table, and size against perplexity."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from llmscale.report.plots import GRID, INK, POINTS, Plot, drawing

COLUMNS = {
    "megabytes": "MB",
    "bits_per_weight": "bits a weight",
    "perplexity": "perplexity",
    "agreement": "agreement",
    "divergence": "KL, nats a token",
    "quantize_seconds": "quantized in s",
    "decode_tokens_per_second": "tokens/s",
}
INCHES = (6.4, 3.6)
NEAR = 0.3
"""The part of the width within which labels would cover each other."""
LABEL_HEIGHT = 0.06
"""Of the plot's."""
LARGEST_RATIO = 3.0
"""Of perplexities on a linear axis."""


@dataclass(frozen=True)
class Comparison:
    """A table, a row a scheme."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Comparison:
    """The figures of a comparison, those that are there."""
    shown = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    return Comparison(
        [COLUMNS[key] for key in shown],
        [(str(row["scheme"]), [_written(row.get(key)) for key in shown]) for row in rows],
    )


def comparison_plot(stage: str, rows: Sequence[Mapping[str, Any]]) -> Plot:
    """Size against perplexity, a labelled point a scheme."""
    drawn = [row for row in rows if math.isfinite(row["perplexity"]) and row["perplexity"] > 0]
    drawn.sort(key=lambda row: row["perplexity"])
    logarithmic = bool(drawn) and drawn[-1]["perplexity"] > LARGEST_RATIO * drawn[0]["perplexity"]
    sizes = [row["megabytes"] for row in drawn]
    heights = [math.log(row["perplexity"]) if logarithmic else row["perplexity"] for row in drawn]
    spots = label_heights(_parts(sizes), _parts(heights))

    def paint(axes: Any) -> None:
        axes.scatter(sizes, [row["perplexity"] for row in drawn], s=26, color=POINTS, zorder=3)
        if logarithmic:
            axes.set_yscale("log")
        axes.margins(x=0.05, y=0.08)
        axes.set_xlim(right=max(sizes) + 0.25 * (max(sizes) - min(sizes) or max(sizes)))
        axes.set(xlabel="size (MB)", ylabel="perplexity")
        low, high = min(heights), max(heights)
        for row, spot in zip(drawn, spots, strict=True):
            height = low + spot * (high - low or 1.0)
            axes.text(
                row["megabytes"],
                math.exp(height) if logarithmic else height,
                f"  {row['scheme']}",
                color=INK,
                fontsize=8.5,
                va="center",
            )
        axes.grid(linewidth=0.6, color=GRID)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)

    lost = len(rows) - len(drawn)
    note = f"{lost} without a finite perplexity left out." if lost else ""
    svg = drawing(f"{stage}-comparison", paint, INCHES) if drawn else Markup("")
    return Plot("Size and perplexity", svg, note)


def label_heights(places: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Where labels go that are beside their points, each above those it would cover.

    Args:
        places: of the points along the width, from 0 to 1.
        heights: likewise, rising.
    """
    spots: list[float] = []
    for place, height in zip(places, heights, strict=True):
        below = [
            spot + LABEL_HEIGHT
            for other, spot in zip(places, spots, strict=False)
            if abs(other - place) < NEAR
        ]
        spots.append(max([height, *below]))
    return spots


def _parts(values: Sequence[float]) -> list[float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return [(value - low) / (high - low or 1.0) for value in values]


def _written(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,.4g}" if abs(value) < 10 else f"{value:,.2f}"
