"""The base of everything a recipe holds, and how a setting says that it is wrong."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict


class Problem(NamedTuple):
    """A setting that cannot run: where it stands, relative to its owner, and why."""

    path: tuple[str, ...]
    message: str


class Settings(BaseModel):
    """A part of a recipe: typed, immutable, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def not_identity(**field: Any) -> dict[str, Any]:
    """Marks a field that changes how a result is computed but not the result itself."""
    return {"json_schema_extra": {"not_identity": True}, **field}


def identity(settings: Settings) -> dict[str, Any]:
    """The settings that decide a result, as plain data: what a fingerprint is made of."""
    return {
        name: _identity_value(getattr(settings, name))
        for name, field in type(settings).model_fields.items()
        if not (
            isinstance(field.json_schema_extra, dict) and "not_identity" in field.json_schema_extra
        )
    }


def _identity_value(value: Any) -> Any:
    if isinstance(value, Settings):
        return identity(value)
    if isinstance(value, tuple | list):
        return [_identity_value(item) for item in value]
    if isinstance(value, dict):
        return {key: _identity_value(item) for key, item in value.items()}
    return value


def under(prefix: str, problems: Iterable[Problem]) -> Iterable[Problem]:
    """The same problems as seen from one level further out."""
    return (Problem((prefix, *problem.path), problem.message) for problem in problems)


def divisors(number: int) -> list[int]:
    """All positive divisors, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def choices(numbers: Iterable[object]) -> str:
    """``1, 2, 4 or 8``, for the end of an error's line."""
    words = [str(number) for number in numbers]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def nearest_multiples(number: int, of: int) -> str:
    """The valid numbers on each side of an invalid one: ``30 or 32``."""
    below = number // of * of
    return choices([below, below + of] if below else [of])
