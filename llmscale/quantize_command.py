"""llmscale quantize: a model with quantized weights, or a comparison of schemes."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from llmscale import runs
from llmscale.data.documents import read_documents
from llmscale.errors import RecipeError
from llmscale.quantization.schemes import SCHEMES, Quantization, SchemeName
from llmscale.recipe.explain import explain
from llmscale.settings import choices


def quantize_model(
    model: str,
    scheme: str,
    target: Path,
    calibration: Sequence[Path],
    tokens: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes a folder with the model's weights quantized; run again after a kill, it goes on.

    Args:
        options: what is set of ``Quantization`` beside the scheme.

    Returns:
        What was made: sizes, seconds, group size.

    Raises:
        RecipeError: if the model, the texts or a setting do not fit.
        MachineError: if a package is missing.
    """
    try:
        settings = Quantization(scheme=_known(scheme), **options)
    except ValidationError as error:
        path, message = explain(error, Quantization)
        raise RecipeError(f"--{'-'.join(path).replace('_', '-')}: {message}") from None
    for key, wrong in settings.misplaced():
        option = "--asymmetric" if key == "symmetric" else f"--{key.replace('_', '-')}"
        raise RecipeError(f"{option}: {wrong}")
    if target.exists():
        raise RecipeError(f"--out: {target} exists; choose a new folder")
    require_calibration(settings.calibrates, calibration)
    folder = runs.model_folder(model)
    from llmscale.quantization.quantize import Listener, quantize

    with _progress("blocks") as on_block:
        figures = quantize(
            folder,
            target,
            settings,
            texts_of(calibration) if calibration else None,
            where="--calibration",
            tokens=tokens,
            listener=Listener(on_block, lambda line: print(line, file=sys.stderr)),
        )
    return {"out": str(target), **figures}


def compare_schemes(
    model: str,
    schemes: str,
    texts: Sequence[Path],
    calibration: Sequence[Path],
    tokens: int,
    window: int | None,
) -> list[dict[str, Any]]:
    """Size, speed and quality of a model under several schemes; the model itself comes first.

    Raises:
        RecipeError: if the model, a text or a scheme is wrong.
    """
    names = [_known(name.strip()) for name in schemes.split(",")]
    if not texts:
        raise RecipeError("--text: a comparison needs texts to measure on; give a text file")
    for text in texts:
        if not text.is_file():
            raise RecipeError(f"--text: {text} is no file; give a text")
    asking = next((name for name in names if SCHEMES[name].calibrated), None)
    require_calibration(asking, calibration)
    folder = runs.model_folder(model)
    from llmscale.quantization.compare import compare

    with _progress("steps") as on_step:
        return compare(
            folder,
            names,
            texts_of(texts),
            lambda: texts_of(calibration),
            tokens=tokens,
            window=window,
            on_step=on_step,
        )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A comparison for people."""
    heads = {
        "scheme": "scheme",
        "megabytes": "MB",
        "bits_per_weight": "bits",
        "perplexity": "perplexity",
        "agreement": "agreement",
        "divergence": "KL, nats",
        "quantize_seconds": "quantize s",
        "decode_tokens_per_second": "tokens/s",
    }
    lines = [list(heads.values())]
    lines += [["-" if row[key] is None else _shown(row[key]) for key in heads] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def require_calibration(asking: str | None, files: Sequence[Path]) -> None:
    """Checks that there are texts where something asks for them.

    Raises:
        RecipeError: if there are none, or one is no file.
    """
    if asking is not None and not files:
        raise RecipeError(
            f"--calibration: {asking} is calibrated with texts; give a text file, such as a "
            "part of what the model was trained on"
        )
    for file in files:
        if not file.is_file():
            raise RecipeError(f"--calibration: {file} is no file; give a text")


def texts_of(files: Sequence[Path]) -> Iterator[str]:
    """The documents of files, one at a time."""
    for file in files:
        for document in read_documents(file):
            yield document.text


def _known(scheme: str) -> SchemeName:
    if scheme not in SCHEMES:
        raise RecipeError(f"{scheme!r} is no scheme; use {choices(get_args(SchemeName))}")
    return scheme  # type: ignore[return-value]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:,.4g}" if value < 10 else f"{value:,.2f}"


@contextmanager
def _progress(unit: str) -> Iterator[Any]:
    """A bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
