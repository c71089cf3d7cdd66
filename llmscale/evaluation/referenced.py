"""Records of prompts and what people wrote behind them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmscale.data.conversations import Form, read_form, require_whole_characters
from llmscale.data.records import Malformed, read_records
from llmscale.errors import RecipeError


class _Several(Form):
    prompt: str
    references: list[str]


class _One(Form):
    prompt: str
    response: str


@dataclass(frozen=True)
class Referenced:
    """A prompt and what may be written behind it."""

    place: str
    prompt: str
    references: tuple[str, ...]


def read_referenced(file: Path) -> list[Referenced]:
    """The records of a file: a prompt with its ``response``, or with several ``references``.

    Raises:
        RecipeError: names the file and line that cannot be used, or the file without records.
    """
    found = []
    for record in read_records(file):
        try:
            found.append(_referenced(record.place, record.value))
        except Malformed as problem:
            raise RecipeError(f"{record.place}: {problem}; mend the line or remove it") from None
    if not found:
        raise RecipeError(f"{file}: holds no record; give one JSON object a line")
    return found


def _referenced(place: str, value: Any) -> Referenced:
    if isinstance(value, Malformed):
        raise value
    if not isinstance(value, dict):
        raise Malformed("no JSON object")
    if "references" in value:
        several = read_form(_Several, value)
        prompt, references = several.prompt, several.references
    else:
        one = read_form(_One, value)
        prompt, references = one.prompt, [one.response]
    if not prompt.strip():
        raise Malformed("empty prompt")
    if not references or not all(text.strip() for text in references):
        raise Malformed("empty reference")
    for text in (prompt, *references):
        require_whole_characters(text)
    return Referenced(place, prompt, tuple(references))
