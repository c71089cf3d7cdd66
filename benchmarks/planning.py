"""The planner's constants fitted to published results, and checked on sources left out.

Fits ``planning/constants.py`` to all rows of the table, then once for each source to all other
sources' rows, and prints the errors of the rows that were left out.

    python benchmarks/planning.py [TABLE.csv]
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from llmscale.planning.constants import PLAUSIBLE, Constants
from llmscale.planning.fit import Measured, fit
from llmscale.planning.published import Row, read_table
from llmscale.planning.validate import Errors, errors, errors_by_source, predict_row

TABLE = Path(__file__).parent.parent / "tests" / "planning" / "published_results.csv"


def measured(rows: Sequence[Row]) -> list[Measured]:
    """Rows that a fit can use."""
    return [
        Measured(row.setup, row.seconds, row.source)
        for row in rows
        if row.setup is not None and row.seconds is not None
    ]


def fitted(rows: Sequence[Row]) -> Constants:
    """By these rows alone: from the middle of what is plausible."""
    middle = {name: (each.low * each.high) ** 0.5 for name, each in PLAUSIBLE.items()}
    return fit(measured(rows), Constants().changed(middle), list(PLAUSIBLE), rounds=6)


def left_out(source: str, rows: Sequence[Row]) -> Constants:
    """The constants as they are without a source."""
    return fitted([row for row in rows if row.source != source])


def show(found: Errors) -> None:
    """One line."""
    numbers = (found.median, found.ninetieth, found.bias, found.rank_correlation)
    shown = " ".join("       -" if n is None else f"{n:8.3f}" for n in numbers)
    print(f"{found.source[:60]:<60} {found.compared:4d} {shown}")


def main(table: Path) -> None:
    """Prints the constants, the errors within the fit, and those of sources left out."""
    _, rows = read_table(table)
    constants = fitted(rows)
    for name, value in constants.plain().items():
        low, high, _ = PLAUSIBLE[name]
        print(f"{name:<22} {value:.4g}   plausible {low:g} to {high:g}")
    print(f"\nfitted to all{'':<47} rows   median     90 %     bias     rank")
    for found in errors_by_source([predict_row(row, constants) for row in rows]):
        show(found)
    sources = list(dict.fromkeys(each.source for each in measured(rows)))
    with ProcessPoolExecutor(2) as pool:
        without = list(pool.map(partial(left_out, rows=rows), sources))
    print(f"\nleft out{'':<52} rows   median     90 %     bias     rank")
    outside = []
    for source, other in zip(sources, without, strict=True):
        own = [predict_row(row, other) for row in rows if row.source == source]
        outside += own
        show(errors(own, source))
    show(errors(outside, "all"))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else TABLE)
