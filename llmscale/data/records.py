"""Records of training data by file and line, and what is wrong with those that cannot be used."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from llmscale.artifacts import write_text
from llmscale.errors import RecipeError

SPACE = re.compile(r"[ \t\r\n]*")
OnMalformed = Literal["refuse", "skip"]
Made = TypeVar("Made")


class Malformed(ValueError):
    """Why a record cannot be used; ``kind`` is that in a few words, to be counted by."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


@dataclass(frozen=True)
class Record:
    """A JSON object, or why there is none, and where it stands."""

    file: Path
    line: int
    value: Any

    @property
    def place(self) -> str:
        """``FILE:LINE``."""
        return f"{self.file}:{self.line}"


def read_records(file: Path) -> Iterator[Record]:
    """The records of a file: the items of one JSON array, else a record a line.

    Raises:
        RecipeError: if the file is not UTF-8.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: byte {error.start} is not UTF-8; convert the file") from None
    text = text.removeprefix("\ufeff")
    read = _items if text.lstrip().startswith("[") else _lines
    yield from (Record(file, line, value) for line, value in read(text))


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, Malformed("broken JSON", str(error))


def _items(text: str) -> Iterator[tuple[int, Any]]:
    """The items of an array, each with the line on which it begins; what is broken ends it."""
    decoder = json.JSONDecoder()
    place, wanted = text.index("[") + 1, "item"
    line = 1 + text.count("\n", 0, place)
    while True:
        begin, place = place, SPACE.match(text, place).end()  # type: ignore[union-attr]
        line += text.count("\n", begin, place)
        sign = text[place : place + 1]
        if sign == "]" and wanted != "item after a comma":
            rest = SPACE.match(text, place + 1).end()  # type: ignore[union-attr]
            if rest < len(text):
                yield line, Malformed("broken JSON", "text behind the end of the array")
            return
        if wanted == "comma":
            if sign != ",":
                yield line, Malformed("broken JSON", "no comma, and no end of the array")
                return
            place, wanted = place + 1, "item after a comma"
            continue
        try:
            value, after = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            yield line, Malformed("broken JSON", str(error))
            return
        yield line, value
        line += text.count("\n", place, after)
        place, wanted = after, "comma"


@dataclass
class Intake:
    """Makes examples of records, and keeps account of those that cannot be used."""

    problems: list[tuple[str, Malformed]] = field(default_factory=list)

    def made(
        self, make: Callable[[dict[str, Any]], Made], file: Path
    ) -> Iterator[tuple[str, Made]]:
        """What is made of a file's records, each with its place; malformed ones are noted."""
        for record in read_records(file):
            try:
                yield record.place, make(json_object(record.value))
            except Malformed as problem:
                self.refuse(record.place, problem)

    def refuse(self, place: str, problem: Malformed) -> None:
        """Notes a record that cannot be used."""
        self.problems.append((place, problem))

    def counts(self) -> dict[str, int]:
        """How many records were left out, by kind."""
        return dict(Counter(problem.kind for _, problem in self.problems))

    def close(self, folder: Path, on_malformed: OnMalformed, setting: str) -> None:
        """Writes ``malformed.txt`` with a line for each, and refuses them if that is asked for.

        Args:
            setting: the recipe's key that says what is asked for.

        Raises:
            RecipeError: names the first one.
        """
        if not self.problems:
            return
        lines = [f"{place}: {problem}" for place, problem in self.problems]
        write_text(folder / "malformed.txt", "\n".join(lines) + "\n")
        if on_malformed == "refuse":
            more = len(lines) - 1
            others = f" (and {more} more, all in {folder / 'malformed.txt'})" if more else ""
            raise RecipeError(f"{lines[0]}{others}; mend the file, or set {setting}=skip")


def json_object(value: Any) -> dict[str, Any]:
    """A record's value as the JSON object it has to be.

    Raises:
        Malformed: if it is none.
    """
    if isinstance(value, Malformed):
        raise value
    if not isinstance(value, dict):
        raise Malformed("no JSON object")
    return value
