"""Documents from files, one at a time: nothing here holds a corpus in memory."""

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmscale.errors import RecipeError


@dataclass(frozen=True)
class Document:
    """A text and where it came from."""

    text: str
    source: str


def read_documents(file: Path, text_key: str = "text") -> Iterator[Document]:
    """The documents of a file: every line of ``.jsonl``, else the file as one document.

    Raises:
        RecipeError: names the file and line that is not UTF-8, or no JSON object with a text.
    """
    try:
        if file.suffix == ".jsonl":
            yield from _json_lines(file, text_key)
        else:
            yield Document(file.read_text(encoding="utf-8"), file.name)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: byte {error.start} is not UTF-8; convert the file") from None


def _json_lines(file: Path, text_key: str) -> Iterator[Document]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[text_key]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise RecipeError(
                    f"{file}:{number}: no JSON object with a text under {text_key!r}; "
                    "mend the line or set text_key"
                )
            yield Document(text, f"{file.name}:{number}")


def cleaned(text: str) -> str:
    """The text in Unicode NFC, with Unix line ends and without a byte-order mark."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", text)
