"""A comparison of schemes on a page: each in the table, and in the plot with its own label."""

import math
import re

import pytest

from llmscale.report.comparisons import (
    LABEL_HEIGHT,
    comparison_plot,
    comparison_table,
    label_heights,
)


def row(
    scheme: str, megabytes: float, perplexity: float, **more: float | None
) -> dict[str, object]:
    return {"scheme": scheme, "megabytes": megabytes, "perplexity": perplexity, **more}


def test_every_scheme_is_in_the_table_with_what_was_measured() -> None:
    rows = [
        row("original", 538.0, 22.55, quantize_seconds=None, agreement=1.0),
        row("int4-gptq", 114.25, 27.4, quantize_seconds=61.0, agreement=0.8123),
    ]
    table = comparison_table(rows)
    assert list(table.columns) == ["MB", "perplexity", "agreement", "quantized in s"]
    assert table.rows == [
        ("original", ["538.00", "22.55", "1", "–"]),
        ("int4-gptq", ["114.25", "27.40", "0.8123", "61.00"]),
    ]


def test_the_plot_names_each_scheme_and_both_axes() -> None:
    names = ["original", "int8-weight", "nf4"]
    svg = comparison_plot("s", [row(n, 100.0 + i, 20.0 + i) for i, n in enumerate(names)]).svg
    for text in (*names, "size (MB)", "perplexity"):
        assert re.search(rf">\s*{re.escape(text)}\s*</text>", svg), text
    assert svg.count("<use") >= 3


def test_schemes_that_came_to_nothing_are_said_to_be_left_out() -> None:
    plot = comparison_plot("s", [row("a", 1.0, 9.0), row("b", 1.0, math.inf)])
    assert plot.note == "1 without a finite perplexity left out."
    assert ">  b<" not in plot.svg
    assert comparison_plot("s", [row("b", 1.0, math.nan)]).svg == ""


@pytest.mark.parametrize("perplexities", [[9.0], [9.0, 9.0], [9.0, 9e6]])
def test_any_perplexities_can_be_drawn(perplexities: list[float]) -> None:
    rows = [row(f"s{n}", 5.0, value) for n, value in enumerate(perplexities)]
    assert "<svg" in comparison_plot("s", rows).svg


def test_labels_near_each_other_do_not_touch() -> None:
    spots = label_heights([0.5, 0.5, 0.9, 0.5], [0.1, 0.1, 0.1, 0.12])
    assert spots[0] == 0.1
    assert spots[2] == 0.1
    assert spots[1] - spots[0] == pytest.approx(LABEL_HEIGHT)
    assert spots[3] - spots[1] == pytest.approx(LABEL_HEIGHT)
