"""Predictions of published results, and how far they are off, by source."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmscale.artifacts import write_text
from llmscale.planning.constants import Constants
from llmscale.planning.hardware import GIBIBYTE
from llmscale.planning.memory import Verdict, memory, verdict
from llmscale.planning.published import Row, read_table
from llmscale.planning.step_time import step_time

ADDED = ("predicted_step_seconds", "predicted_memory_gib", "relative_error", "why_not")
FAR_OUT = 1.10
"""A row that ran, though more than so many times its device's memory is predicted, is an error."""


@dataclass(frozen=True)
class Predicted:
    """A row and what is predicted of it; ``why_not`` where nothing is."""

    row: Row
    seconds: float | None = None
    memory_gib: float | None = None
    memory_share: float = 0.0
    verdict: Verdict = "fits"
    why_not: str = ""

    @property
    def relative_error(self) -> float | None:
        """Of step time, signed."""
        if self.seconds is None or self.row.seconds is None:
            return None
        return self.seconds / self.row.seconds - 1.0

    @property
    def memory_error(self) -> float | None:
        """Of memory, signed."""
        if self.memory_gib is None or self.row.memory_gib is None:
            return None
        return self.memory_gib / self.row.memory_gib - 1.0


@dataclass(frozen=True)
class Errors:
    """Of one source, or of all: step time, then memory.

    ``rank_correlation`` is Spearman's, of predicted and measured step times.
    """

    source: str
    rows: int
    compared: int
    median: float | None
    ninetieth: float | None
    bias: float | None
    rank_correlation: float | None
    memory_rows: int
    memory_median: float | None
    ran_called_out: int
    out_of_memory: int
    out_called_fitting: int


def predict_row(row: Row, constants: Constants) -> Predicted:
    """What a row's run takes."""
    if row.setup is None:
        return Predicted(row, why_not=row.why_not)
    need = memory(row.setup)
    return Predicted(
        row,
        seconds=step_time(row.setup, constants).total,
        memory_gib=need.total / GIBIBYTE,
        memory_share=need.total / row.setup.device.memory_bytes,
        verdict=verdict(need, row.setup.device),
        why_not="" if row.seconds is not None or row.ran_out else _nothing_measured(),
    )


def _nothing_measured() -> str:
    return "iter_s, tokens_per_s_per_gpu, tflops_per_gpu, mfu: empty, so there is no error"


def validate(table: Path, constants: Constants) -> tuple[list[str], list[Predicted]]:
    """The table's columns, and a prediction for each of its rows.

    Raises:
        RecipeError: if the file is no table of results.
    """
    columns, rows = read_table(table)
    return columns, [predict_row(row, constants) for row in rows]


def write_predictions(file: Path, columns: Sequence[str], predicted: Sequence[Predicted]) -> None:
    """The table with ``ADDED`` columns, whole or not at all."""
    text = io.StringIO()
    names = [*(column for column in columns if column not in ADDED), *ADDED]
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for one in predicted:
        added = {
            "predicted_step_seconds": _shown(one.seconds),
            "predicted_memory_gib": _shown(one.memory_gib),
            "relative_error": _shown(one.relative_error),
            "why_not": one.why_not,
        }
        writer.writerow({**one.row.cells, **added})
    write_text(file, text.getvalue())


def _shown(number: float | None) -> str:
    return "" if number is None else f"{number:.6g}"


def errors_by_source(predicted: Sequence[Predicted]) -> list[Errors]:
    """Of each source in the table's order, and of all together last."""
    sources = list(dict.fromkeys(one.row.source for one in predicted))
    found = [errors([o for o in predicted if o.row.source == source], source) for source in sources]
    return [*found, errors(predicted, "all")]


def errors(predicted: Sequence[Predicted], source: str) -> Errors:
    """Of some rows together."""
    timed = [one for one in predicted if one.relative_error is not None]
    pairs = [(one.seconds or 0.0, one.row.seconds or 0.0) for one in timed]
    off = [guess / truth - 1.0 for guess, truth in pairs]
    held = [abs(one.memory_error) for one in predicted if one.memory_error is not None]
    out = [one for one in predicted if one.row.ran_out and one.seconds is not None]
    return Errors(
        source=source,
        rows=len(predicted),
        compared=len(timed),
        median=quantile([abs(error) for error in off], 0.5),
        ninetieth=quantile([abs(error) for error in off], 0.9),
        bias=quantile(off, 0.5),
        rank_correlation=spearman(pairs),
        memory_rows=len(held),
        memory_median=quantile(held, 0.5),
        ran_called_out=sum(one.memory_share > FAR_OUT for one in timed),
        out_of_memory=len(out),
        out_called_fitting=sum(one.verdict == "fits" for one in out),
    )


def quantile(numbers: Sequence[float], share: float) -> float | None:
    """By linear interpolation; None of nothing."""
    if not numbers:
        return None
    ordered = sorted(numbers)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None of fewer than three pairs."""
    if len(pairs) < 3:
        return None
    import numpy

    left, right = (_ranks([pair[side] for pair in pairs]) for side in (0, 1))
    if len(set(left)) == 1 or len(set(right)) == 1:
        return None
    return float(numpy.corrcoef(left, right)[0, 1])


def _ranks(numbers: Sequence[float]) -> list[float]:
    ordered = sorted(numbers)
    count = {number: ordered.count(number) for number in set(numbers)}
    first = {number: ordered.index(number) for number in set(numbers)}
    return [first[number] + (count[number] - 1) / 2 for number in numbers]


def plain(found: Sequence[Errors]) -> list[dict[str, Any]]:
    """For ``--json``."""
    return [asdict(each) for each in found]
