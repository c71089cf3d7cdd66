"""What every command takes and how it answers: text or JSON, errors in one line."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmscale.errors import LlmscaleError

if TYPE_CHECKING:
    from rich.console import Console

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace its own.")
]
RunDir = Annotated[str, typer.Argument(metavar="RUN_DIR", help="The folder or URL of a run.")]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face folder or RUN_DIR:STAGE.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Out = Annotated[Path, typer.Option("--out", help="The folder to write.")]


def console(as_json: bool) -> "Console":
    """Where people are told how it goes; standard error where standard output is for JSON."""
    from rich.console import Console

    return Console(stderr=as_json, highlight=False, soft_wrap=True)


def tell(as_json: bool, answer: Any, text: str = "") -> None:
    """Writes an answer to standard output: for people, or as one JSON object."""
    if as_json:
        sys.stdout.write(json.dumps(answer, default=str) + "\n")
    elif text:
        sys.stdout.write(text + "\n")


@contextmanager
def one_line_errors(as_json: bool) -> Iterator[None]:
    """An error is one line on standard error; with ``--json`` an object on standard output too."""
    try:
        yield
    except LlmscaleError as error:
        _fail(as_json, str(error), error.exit_code, error.answer)
    except typer.Abort:
        _fail(as_json, "interrupted", 130)
    except KeyboardInterrupt:
        _fail(as_json, "interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(as_json, f"{where}{error.strerror or error}; free or mend it and run again", 4)


def _fail(as_json: bool, line: str, code: int, answer: dict[str, Any] | None = None) -> None:
    sys.stderr.write(" ".join(line.split()) + "\n")
    tell(as_json, {"error": line, "exit_code": code, **(answer or {})})
    sys.exit(code)
