"""Constants refined by a cluster's own measured runs, kept by name."""

import json
import os
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from llmscale.artifacts import write_text
from llmscale.errors import RecipeError
from llmscale.planning.constants import Constants
from llmscale.planning.fit import Measured, fit
from llmscale.planning.setup import Setup
from llmscale.settings import shown

FOLDER = Path(os.environ.get("LLMSCALE_CALIBRATIONS", "~/.config/llmscale/calibrations"))
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
COMMON = ("memory", "link", "network", "hidden_data", "straggling")
NOISE = 0.02
"""Of a median of many steps of one's own run; other runs on the same cluster differ by so much."""
WARM_UP = 0.1
"""Of the logged steps, left out: the first ones compile and fill caches."""


def calibration_file(name: str) -> Path:
    """Where a calibration is.

    Raises:
        RecipeError: if the name cannot be a file's.
    """
    if NAME.fullmatch(name) is None:
        raise RecipeError(f"--calibration {shown(name)}: use letters, digits and . _ - for a name")
    return FOLDER.expanduser() / f"{name}.json"


def load_calibration(name: str) -> Constants:
    """The constants saved by that name, or else the shipped ones.

    Raises:
        RecipeError: if the file is damaged.
    """
    file = calibration_file(name)
    if not file.exists():
        return Constants()
    try:
        known = Constants().plain()
        values = json.loads(file.read_text(encoding="utf-8"))["constants"]
        return Constants().changed({key: float(values[key]) for key in values if key in known})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{file}: is no calibration ({error}); remove it") from None


def calibrate(name: str, setup: Setup, seconds: float) -> Constants:
    """Refines the constants saved by a name with one more measured run, and saves them.

    Of the constants, those move that say most of this device and network, each within its
    plausible range and from where earlier runs have brought it.
    """
    before = load_calibration(name)
    products = f"{setup.device.generation}_products"
    names = [*([products] if hasattr(before, products) else []), *COMMON]
    measured = [Measured(setup, seconds, name)]
    after = fit(measured, before, names, centre=before, noise=NOISE)
    file = calibration_file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({"constants": after.plain()}, indent=2) + "\n")
    return after


def measured_seconds(file: Path) -> float:
    """The median step time of a run's ``metrics.jsonl``.

    Raises:
        RecipeError: if it holds no step times.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or error
        raise RecipeError(f"{file}: {cause}; give a stage's metrics.jsonl") from None
    seconds = list(_step_seconds(lines))
    settled = seconds[int(WARM_UP * len(seconds)) :]
    if not settled:
        raise RecipeError(f"{file}: holds no step_seconds; give a stage's metrics.jsonl")
    return statistics.median(settled)


def _step_seconds(lines: Iterable[str]) -> Iterable[float]:
    for line in lines:
        try:
            logged = json.loads(line)
        except ValueError:
            continue
        seconds = logged.get("step_seconds") if isinstance(logged, dict) else None
        if isinstance(seconds, int | float) and seconds > 0:
            yield float(seconds)
