"""Rows of a table of published results: what was run, and what came of it."""

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llmscale.errors import RecipeError
from llmscale.planning.cells import Unpredictable, positive
from llmscale.planning.flops import Convention, step_flops
from llmscale.planning.hardware import Number
from llmscale.planning.published_setup import row_setup
from llmscale.planning.setup import Setup


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        cells: as they are in the file.
        setup: what was run; None where ``why_not`` says why that is not known.
        seconds: of a step, measured, or from what was measured.
        memory_gib: measured.
        ran_out: of memory; then nothing was measured.
    """

    cells: Mapping[str, str]
    setup: Setup | None = None
    why_not: str = ""
    seconds: float | None = None
    memory_gib: float | None = None
    ran_out: bool = False

    @property
    def source(self) -> str:
        """The publication."""
        return self.cells.get("source", "")


def read_table(file: Path) -> tuple[list[str], list[Row]]:
    """The columns of a CSV file, and its rows.

    Raises:
        RecipeError: if the file cannot be read as a table.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened, restkey="", restval="")
            columns = list(reader.fieldnames or [])
            rows = [read_row({c: str(cells.get(c) or "") for c in columns}) for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        cause = getattr(error, "strerror", None) or error
        raise RecipeError(f"{file}: {cause}; give a table as CSV, in UTF-8") from None
    if not rows or ("model" not in columns and "hidden" not in columns):
        raise RecipeError(
            f"{file}: is no table of results; its first line names columns: source, model, layers, "
            "hidden, heads, seq, vocab, gpu, gpus, tp, pp, micro_batch, global_batch, iter_s ..."
        )
    return columns, rows


def read_row(cells: Mapping[str, str]) -> Row:
    """One row; whatever it holds gives a row, not an error."""
    notes = cells.get("notes", "")
    row = Row(cells, memory_gib=_measured_memory(notes), ran_out=_ran_out(cells))
    try:
        setup = row_setup(cells)
        return replace(row, setup=setup, seconds=_measured_seconds(cells, setup))
    except Unpredictable as error:
        return replace(row, why_not=str(error))
    except (RecipeError, ArithmeticError, ValueError) as error:
        return replace(row, why_not=" ".join(str(error).split()) or type(error).__name__)


def convention(text: str) -> Convention:
    """Which FLOP a publication counts."""
    lower = text.lower()
    if "hardware" in lower:
        return "hardware"
    if "non-causal" in lower or "foundry" in lower:
        return "six n"
    if "bridge" in lower or "nemo" in lower:
        return "causal"
    return "megatron"


def _measured_seconds(cells: Mapping[str, str], setup: Setup) -> float | None:
    """Of a step: as printed, or from tokens, or from FLOP/s as the publication counts them."""
    if (seconds := positive(cells, "iter_s")) is not None:
        return seconds
    if (rate := positive(cells, "tokens_per_s_per_gpu")) is not None:
        return setup.tokens / (rate * setup.gpus)
    text = " ".join(cells.get(key, "") for key in ("source", "notes"))
    flops = step_flops(
        convention(text),
        setup.architecture,
        setup.vocabulary,
        setup.sequence_length,
        setup.global_batch,
    )
    if (tera := positive(cells, "tflops_per_gpu")) is not None:
        return flops / (tera * 1e12 * setup.gpus)
    if (share := positive(cells, "mfu")) is not None:
        number: Number = "fp8" if "fp8 peak" in text.lower() else "half"
        share = share / 100 if share > 1 else share
        return flops / (share * setup.device.peak(number) * setup.gpus)
    return None


def _measured_memory(notes: str) -> float | None:
    told = re.search(r"\bmem(?:ory)?_gi?b=(\d+(?:\.\d+)?)", notes)
    return None if told is None else float(told[1])


def _ran_out(cells: Mapping[str, str]) -> bool:
    notes = cells.get("notes", "")
    if any(cells.get(key, "").strip() for key in ("iter_s", "tokens_per_s_per_gpu", "mfu")):
        return False
    return re.search(r"\bOOM\b|out of memory", notes) is not None
