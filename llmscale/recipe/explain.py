"""One line, with a mend, for what pydantic found wrong."""

import difflib
from typing import Any, get_args

from pydantic import ValidationError

from llmscale.recipe.yaml_places import KeyPath
from llmscale.settings import Settings, choices


def explain(error: ValidationError, settings: type[Settings]) -> tuple[KeyPath, str]:
    """The key path of the first problem and a line about it.

    Keys nobody knows come first: a mistyped key is the likelier cause of one that is missing.
    """
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    detail = details[0]
    path = tuple(str(part) for part in detail["loc"] if part != "[key]")
    match detail["type"]:
        case "extra_forbidden":
            message = _unknown_key(path, settings)
        case "missing":
            message = "is missing; add it"
        case "literal_error":
            message = _not_a_choice(detail)
        case _:
            wanted = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            message = f"{_shown(detail['input'])} is wrong; give {wanted}"
    if len(details) > 1:
        message += f" (and {len(details) - 1} more)"
    return path, message


def _unknown_key(path: KeyPath, settings: type[Settings]) -> str:
    owner = _settings_at(path[:-1], settings)
    known = [field.alias or name for name, field in owner.model_fields.items()] if owner else []
    close = difflib.get_close_matches(path[-1], known, n=1)
    return f"unknown key; use {close[0] if close else choices(known)}"


def _not_a_choice(detail: Any) -> str:
    expected = str(detail["ctx"]["expected"]).replace("'", "")
    return f"{_shown(detail['input'])} is no choice; use {expected}"


def _shown(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."


def _settings_at(path: KeyPath, settings: type[Settings]) -> type[Settings] | None:
    found: type[Settings] | None = settings
    for key in path:
        if found is None or key.isdigit():
            continue
        fields = {field.alias or name: field for name, field in found.model_fields.items()}
        found = _settings_in(fields[key].annotation) if key in fields else None
    return found


def _settings_in(annotation: Any) -> type[Settings] | None:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    for argument in get_args(annotation):
        if (found := _settings_in(argument)) is not None:
            return found
    return None
