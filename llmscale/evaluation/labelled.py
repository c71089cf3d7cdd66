"""Records of texts with labels, and prompts made of them."""

import random
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmscale.data.conversations import require_whole_characters
from llmscale.data.records import Malformed, json_object, read_records
from llmscale.errors import RecipeError

FIELD = re.compile(r"\{(\w+)\}")
BETWEEN = "\n\n"
"""What stands between a prompt's examples."""


@dataclass(frozen=True)
class Labelled:
    """A record: the fields a prompt is made of, the right label, and who it is about."""

    place: str
    fields: Mapping[str, str]
    label: str
    group: str = ""

    def prompt(self, template: str) -> str:
        """The template with the record's fields in it."""
        return FIELD.sub(lambda found: self.fields[found[1]], template)

    def with_fields(self, fields: Mapping[str, str]) -> "Labelled":
        """The same record with other texts."""
        return replace(self, fields=fields)


def fields_of(template: str) -> list[str]:
    """The fields of a record that a template takes, each once."""
    return list(dict.fromkeys(FIELD.findall(template)))


def read_labelled(
    file: Path, fields: Sequence[str], labels: Collection[str] = (), group: str | None = None
) -> list[Labelled]:
    """The records of a file, a JSON object a line.

    Args:
        fields: those that are read, beside ``label``.
        labels: those that there are; any, if none is given.
        group: the field that says who a record is about.

    Raises:
        RecipeError: names the file and line that cannot be used, or the file without records.
    """
    found = list(_read(file, fields, labels, group))
    if not found:
        raise RecipeError(f"{file}: holds no record; give one JSON object a line")
    return found


def _read(
    file: Path, fields: Sequence[str], labels: Collection[str], group: str | None
) -> Iterator[Labelled]:
    for record in read_records(file):
        try:
            value = json_object(record.value)
            label = _word(value, "label")
            if labels and label not in labels:
                raise Malformed("unknown label", f"{label!r} is none of {', '.join(labels)}")
            yield Labelled(
                record.place,
                {field: _text(value, field) for field in fields},
                label,
                _word(value, group) if group else "",
            )
        except Malformed as problem:
            raise RecipeError(f"{record.place}: {problem}; mend the line or remove it") from None


def _text(record: Mapping[str, Any], field: str) -> str:
    text = record.get(field)
    if text is None:
        raise Malformed("missing field", field)
    if not isinstance(text, str) or not text.strip():
        raise Malformed("wrong field", f"{field} is no text")
    require_whole_characters(text)
    return text


def _word(record: Mapping[str, Any], field: str) -> str:
    """A text or a whole number, as a text."""
    value = record.get(field)
    return str(value) if type(value) is int else _text(record, field)


def with_examples(
    asked: Sequence[Labelled],
    originals: Sequence[Labelled],
    known: Sequence[Labelled],
    shots: int,
    template: str,
    texts: Mapping[str, str],
    seed: int,
) -> list[str]:
    """Prompts, each behind the same examples and their labels, drawn by the seed.

    An example that is what is asked is left out of that prompt, for another one.

    Args:
        originals: what is asked as it was before it was spoilt; the same where it was not.
        shots: how many.
        texts: what stands for each label.
    """
    drawn = random.Random(f"examples {seed}").sample(known, min(shots + 1, len(known)))
    shown = [(dict(one.fields), one.prompt(template) + texts[one.label]) for one in drawn]
    prompts = []
    for one, original in zip(asked, originals, strict=True):
        others = [text for fields, text in shown if fields != dict(original.fields)]
        prompts.append(BETWEEN.join([*others[:shots], one.prompt(template)]))
    return prompts
