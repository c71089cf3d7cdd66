"""One line, with a mend, for what pydantic found wrong."""

import difflib
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from llmscale.recipe.yaml_places import KeyPath
from llmscale.settings import Settings, choices, shown

NAME_RULE = "letters, digits, - and _, at most 100 of them, a letter or digit first"

WRONG_TYPES = {
    "bool_type": "is neither true nor false; use one of them",
    "dict_type": "is no mapping of keys; give one",
    "finite_number": "is no finite number; give one",
    "float_type": "is no number; give one",
    "invalid_key": "is no key; use words",
    "model_type": "is no mapping of keys; give one",
    "string_pattern_mismatch": f"is no name; use {NAME_RULE}",
    "string_too_long": f"is too long; use {NAME_RULE}",
    "tuple_type": "is no list; write it as [...]",
}

BOUNDS = {
    "greater_than": ("gt", "too small; use a number above"),
    "greater_than_equal": ("ge", "too small; use at least"),
    "less_than": ("lt", "too large; use a number below"),
    "less_than_equal": ("le", "too large; use at most"),
}


def explain(error: ValidationError, settings: type[Settings]) -> tuple[KeyPath, str]:
    """The key path of the first problem and a line about it.

    Keys nobody knows come first: a mistyped key is the likelier cause of one that is missing.
    """
    detail = min(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    path = tuple(str(part) for part in detail["loc"] if part != "[key]")
    if detail["type"] == "extra_forbidden":
        return path, _unknown_key(path, settings)
    return path, _cause_and_mend(detail)


def nearest_key(wanted: str, keys: Iterable[str]) -> str | None:
    """The key that is most like the wanted one, if any is like it."""
    return next(iter(difflib.get_close_matches(wanted, keys, n=1)), None)


def _cause_and_mend(detail: Any) -> str:
    value, context = detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "missing":
            return "is missing; add it"
        case "literal_error":
            expected = str(context["expected"]).replace("'", "")
            return f"{shown(value)} is no choice; use {expected}"
        case "int_type":
            return f"{shown(value)} is no whole number; {_whole_number(value)}"
        case "string_type":
            return f"{shown(value)} is no text; {_text(value)}"
        case "too_short":
            return "is empty; give at least one"
        case "too_long":
            return f"has {context['actual_length']}; give at most {context['max_length']}"
        case "value_error":
            return str(context["error"])
        case kind if kind in BOUNDS:
            bound, cause = BOUNDS[kind]
            return f"{shown(value)} is {cause} {context[bound]}"
        case kind:
            return f"{shown(value)} {WRONG_TYPES.get(kind, 'is wrong; give another value')}"


def _whole_number(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return f"write {int(value)}"
    if isinstance(value, str) and value.strip().isdecimal():
        return "remove the quotes"
    return "give one"


def _text(value: Any) -> str:
    return "put it in quotes" if isinstance(value, bool | int | float) else "give a text"


def _unknown_key(path: KeyPath, settings: type[Settings]) -> str:
    owner = _settings_at(path[:-1], settings)
    if owner is None:
        return "unknown key; remove it"
    known = [field.alias or name for name, field in owner.model_fields.items()]
    near = nearest_key(path[-1], [*known, *owner.keys_read_before])
    return f"unknown key; use {near or choices(known)}"


def _settings_at(path: KeyPath, settings: type[Settings]) -> type[Settings] | None:
    found: type[Settings] | None = settings
    a_name_is_next = False
    for key in path:
        if found is None or key.isdigit() or a_name_is_next:
            a_name_is_next = False
            continue
        fields = {field.alias or name: field for name, field in found.model_fields.items()}
        annotation = fields[key].annotation if key in fields else None
        origins = [get_origin(part) for part in (annotation, *get_args(annotation))]
        found, a_name_is_next = _settings_in(annotation), dict in origins
    return found


def _settings_in(annotation: Any) -> type[Settings] | None:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    for argument in get_args(annotation):
        if (found := _settings_in(argument)) is not None:
            return found
    return None
