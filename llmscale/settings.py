"""The base of everything a recipe holds, and how a setting says that it is wrong."""

import json
import math
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=100)]
"""What a user calls a part of a recipe; it may be a folder's name."""


class Problem(NamedTuple):
    """A setting that cannot run: where it stands, relative to its owner, and why."""

    path: tuple[str, ...]
    message: str


class Settings(BaseModel):
    """A part of a recipe: typed, immutable, and strict: no key or type is guessed at."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        defer_build=True,
        validate_default=True,
        strict=True,
        allow_inf_nan=False,
    )

    keys_read_before: ClassVar[tuple[str, ...]] = ()
    """Keys a user may write here that are gone when the settings are made."""

    @model_validator(mode="before")
    @classmethod
    def _lists_as_tuples(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }


NOT_IDENTITY = "not identity"
"""Marks (by ``Annotated``) a field that changes how a result is computed, not the result."""


def identity(settings: Settings) -> dict[str, Any]:
    """The settings that decide a result, as plain data: what a fingerprint is made of."""
    return {
        name: _identity_value(getattr(settings, name))
        for name, field in type(settings).model_fields.items()
        if NOT_IDENTITY not in field.metadata
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
    small = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def nearest(numbers: Iterable[int], wanted: int) -> list[int]:
    """Those to offer in place of a wrong number: at most four below it and two above."""
    ascending = sorted(numbers)
    below = [number for number in ascending if number < wanted]
    above = [number for number in ascending if number > wanted]
    return below[-4:] + above[:2]


def shown(value: object, most: int = 60) -> str:
    """A value as an error's line shows it: as YAML on one line, and short."""
    plain = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    text = repr(plain) if isinstance(value, str) else plain
    return text if len(text) <= most else f"{text[: most - 3]}..."


def choices(numbers: Iterable[object]) -> str:
    """``1, 2, 4 or 8``, for the end of an error's line."""
    words = [str(number) for number in numbers]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def nearest_multiples(number: int, of: int) -> str:
    """The valid numbers on each side of an invalid one: ``30 or 32``."""
    below = number // of * of
    return choices([below, below + of] if below else [of])
