"""A sweep: one recipe at every combination of some values of its keys."""

import copy
import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from itertools import product
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from llmscale.recipe.explain import nearest_key
from llmscale.recipe.yaml_places import Document, KeyPath
from llmscale.settings import Problem, choices, shown

MOST_MEMBERS = 1000
OF_THE_WHOLE = ("cluster", "include", "name", "sweep")
"""Keys that the members of a sweep have in common."""


def _listed(values: Any) -> Any:
    return tuple(values) if isinstance(values, list) else values


Values = Annotated[tuple[Any, ...], BeforeValidator(_listed), Field(min_length=1)]
Sweep = Annotated[dict[str, Values], Field(min_length=1)]
"""Key paths, each with the values it takes."""


def grid(sweep: Mapping[str, tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
    """The members by number, ``000`` first, and each one's values; the last key varies fastest."""
    combinations = product(*sweep.values())
    return {
        f"{number:03d}": dict(zip(sweep, values, strict=True))
        for number, values in enumerate(combinations)
    }


def sweep_problems(
    sweep: Mapping[str, tuple[Any, ...]], stages: Collection[str]
) -> Iterator[Problem]:
    """What is wrong with the keys and the lists, whatever the members are."""
    for key, values in sweep.items():
        cause = _key_problem(key, sweep, stages) or _repeated(values)
        if cause is not None:
            yield Problem(("sweep", key), cause)
    members = math.prod(len(values) for values in sweep.values())
    if members > MOST_MEMBERS:
        yield Problem(("sweep",), f"has {members} members; give at most {MOST_MEMBERS}")


def _key_problem(key: str, keys: Collection[str], stages: Collection[str]) -> str | None:
    first, *rest = key.split(".")
    if not all((first, *rest)):
        return "is no key path; write it like stages.pretrain.steps"
    if first in OF_THE_WHOLE:
        return f"all members have the same {first}; remove it"
    if key == "stages":
        return "is all stages at once; give a key in one, like stages.pretrain.steps"
    if first == "stages" and rest[0] not in stages:
        use = nearest_key(rest[0], stages) or choices(stages)
        return f"{shown(rest[0])} is no stage of this recipe; use {use}"
    outer = next((other for other in keys if key.startswith(f"{other}.")), None)
    return None if outer is None else f"is a part of {outer}; sweep one of the two"


def _repeated(values: tuple[Any, ...]) -> str | None:
    counts = Counter(json.dumps(value, sort_keys=True) for value in values)
    twice = next((text for text, count in counts.items() if count > 1), None)
    return None if twice is None else f"{shown(json.loads(twice))} stands twice; remove one"


def member_documents(
    document: Document, sweep: Mapping[str, tuple[Any, ...]]
) -> Iterator[tuple[tuple[int, ...], Document]]:
    """Each member as a recipe of its own, with the places of the values it was made by.

    Yields:
        which of its values each key takes, and the recipe.

    Raises:
        RecipeError: if a key path leads through something that has no keys.
    """
    plain = {key: value for key, value in document.values.items() if key != "sweep"}
    for chosen in product(*(range(len(values)) for values in sweep.values())):
        member = Document(copy.deepcopy(plain))
        taken = {key: sweep[key][at] for key, at in zip(sweep, chosen, strict=True)}
        for (key, value), at in zip(taken.items(), chosen, strict=True):
            path, place = key_path(key), document.place(("sweep", key, str(at)))
            for depth in range(len(path)):
                member.places[path[:depth]] = f"{place}: sweep: with {in_words(taken)}"
            member.set(path, copy.deepcopy(value), f"{place}: sweep")
        yield chosen, member


def in_words(values: Mapping[str, Any]) -> str:
    """A member's values for people: ``seed=1, stages.pretrain.steps=20``."""
    return ", ".join(f"{key}={shown(value)}" for key, value in values.items())


def key_path(key: str) -> KeyPath:
    """A key path from how a user writes it."""
    return tuple(key.split("."))


def value_at(values: Any, path: KeyPath) -> Any:
    """What stands at a key path of plain data; None where it does not lead anywhere."""
    for key in path:
        if isinstance(values, dict):
            values = values.get(key)
        elif isinstance(values, list) and key.isdecimal() and int(key) < len(values):
            values = values[int(key)]
        else:
            return None
    return values


def with_paths_resolved(written: Any, read: Any) -> Any:
    """A value as the user wrote it, but with the texts, such as paths, that reading changed."""
    if isinstance(written, str) and isinstance(read, str):
        return read
    if isinstance(written, dict) and isinstance(read, dict):
        return {k: with_paths_resolved(value, read.get(k)) for k, value in written.items()}
    if isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        return [with_paths_resolved(*pair) for pair in zip(written, read, strict=True)]
    return written
