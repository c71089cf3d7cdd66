"""A stage's logged quantities as inline SVG, drawn by matplotlib."""

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

Record = Mapping[str, Any]
Point = tuple[float, float]

POINTS_DRAWN = 2000
LARGEST_DRAWN = 1e150
"""Matplotlib's margins and ticks overflow a double beyond about its square."""

FIGURE_INCHES = (5.0, 2.7)
ROUND_STEPS = [1, 2, 5, 10]
AXIS_LABELS = {
    "loss": "loss (nats)",
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm (L2)",
    "tokens_per_second": "tokens per second",
    "reward": "reward (mean of an answer)",
    "kl": "KL to the reference (nats an answer)",
    "entropy": "entropy (nats a token)",
    "clip_fraction": "share of tokens clipped",
    "update_kl": "KL of an update (nats a token)",
    "answer_tokens": "tokens an answer",
    "without_end": "share of answers cut off",
}
VALIDATION = "validation_"
"""How the name of a quantity begins that was measured on what is not learned."""
NOT_PLOTTED = {"step", "tokens", "step_seconds", "mfu"}

INK, GRID, LINE, POINTS = "#010101", "#020202", "#030303", "#040404"
PAGE_COLORS = {
    INK: "var(--quiet)",
    GRID: "var(--rule)",
    LINE: "var(--line)",
    POINTS: "var(--points)",
}
"""Colours no plot has otherwise, and the page's own that stand in for them, light or dark."""


@dataclass(frozen=True)
class Plot:
    """A picture, and what it leaves out."""

    title: str
    svg: Markup
    note: str


def series(records: Iterable[Record], key: str) -> list[Point]:
    """A logged quantity over the steps; not all of its values need be finite."""
    return [
        (record["step"], record[key])
        for record in records
        if "step" in record and isinstance(record.get(key), int | float)
    ]


def thin(points: Sequence[Point], limit: int = POINTS_DRAWN) -> Sequence[Point]:
    """At most ``limit`` of the points; the lowest and highest of each stretch stay."""
    if len(points) <= limit:
        return points
    stretches = limit // 2
    kept: list[Point] = []
    for number in range(stretches):
        begin, end = (i * len(points) // stretches for i in (number, number + 1))
        by_height = sorted(points[begin:end], key=lambda point: point[1])
        kept += sorted({by_height[0], by_height[-1]})
    return kept


def plots(stage: str, records: Sequence[Record]) -> list[Plot]:
    """The known quantities in their order, then whatever else the stage logged.

    What was measured in validation, too, is in the same picture.
    """
    logged = dict.fromkeys(key.removeprefix(VALIDATION) for record in records for key in record)
    plots = []
    for key in dict.fromkeys([*AXIS_LABELS, *logged]):
        if key in NOT_PLOTTED:
            continue
        words = key.replace("_", " ")
        lines = {
            f"training {words}": series(records, key),
            f"validation {words}": series(records, f"{VALIDATION}{key}"),
        }
        if any(lines.values()):
            plots.append(_plot(f"{stage}-{key}", key, lines))
    return plots


def _plot(identity: str, key: str, lines: Mapping[str, Sequence[Point]]) -> Plot:
    drawn = {
        label: [point for point in points if abs(point[1]) < LARGEST_DRAWN]
        for label, points in lines.items()
    }
    lost = sum(len(points) for points in lines.values()) - sum(map(len, drawn.values()))
    words = key.replace("_", " ")
    if not lines[f"training {words}"]:
        words = f"validation {words}"
    note = f"{lost:,} value{'s' * (lost > 1)} not finite, left out." if lost else ""
    svg = Markup("")
    if any(drawn.values()):
        svg = draw(identity, AXIS_LABELS.get(key, words), drawn)
    return Plot(words[:1].upper() + words[1:], svg, note)


def draw(identity: str, axis_label: str, lines: Mapping[str, Sequence[Point]]) -> Markup:
    """Curves over steps as inline SVG in the page's colours; the second one as points.

    Args:
        identity: what no other drawing of the page is called.
        axis_label: of the vertical axis, with its unit.
        lines: points by label.
    """

    def paint(axes: Any) -> None:
        for label, points in lines.items():
            _draw_line(axes, label, thin(points), as_points=label.startswith("validation"))
        _dress(axes, axis_label, legend=sum(map(bool, lines.values())) > 1)

    return drawing(identity, paint)


def drawing(
    identity: str, paint: Callable[[Any], None], inches: tuple[float, float] = FIGURE_INCHES
) -> Markup:
    """What is painted on a figure's axes, as inline SVG in the page's colours.

    Args:
        identity: what no other drawing of the page is called.
        paint: is given matplotlib's axes; uses the colours above.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.hashsalt": identity,
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.size": 9.5,
        "axes.edgecolor": GRID,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": GRID,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=inches, layout="constrained")
        paint(figure.add_subplot())
        buffer = io.StringIO()
        nameless = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nameless)
    return _for_page(buffer.getvalue(), identity)


def _draw_line(axes: Any, label: str, points: Sequence[Point], as_points: bool) -> None:
    if not points:
        return
    steps, values = zip(*points, strict=True)
    lone = len(points) == 1
    axes.plot(
        steps,
        values,
        label=label,
        color=POINTS if as_points else LINE,
        linewidth=1.0 if as_points else 1.3,
        linestyle=":" if as_points else "-",
        marker="o" if as_points or lone else None,
        markersize=4,
        zorder=3 if as_points else 2,
    )


def _dress(axes: Any, axis_label: str, legend: bool) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

    axes.set_xlabel("step")
    axes.set_ylabel(axis_label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=ROUND_STEPS))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS))
    if axis_label == AXIS_LABELS["tokens_per_second"]:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    if legend:
        axes.legend(frameon=False, loc="upper right")


def _for_page(svg: str, identity: str) -> Markup:
    """The drawing alone, scalable, its colours the page's and its names its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r"<svg \1>", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'((?: id="|href="#|url\(#))', rf"\g<1>{identity}-", svg)
    for color, variable in PAGE_COLORS.items():
        svg = svg.replace(color, variable)
    return Markup(svg)
