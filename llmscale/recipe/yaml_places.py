"""YAML as plain data, with the file and line of every key.

The scalars are those of YAML 1.2's core schema: ``on`` and ``no`` are words, ``1e-3`` is
a number.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmscale.errors import RecipeError

KeyPath = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """A safe loader with YAML 1.2's scalars."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(rf"^(?:{_pattern})$"),
        ["" if character == "\0" else character for character in _first],
    )


@dataclass
class Document:
    """Plain data and the place (``file:line``) of each key path in it."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Where a key, or the nearest one around it, was written."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "recipe")

    def merge(self, over: "Document") -> None:
        """Lays another document over this one; mappings merge, all else is replaced."""
        _merge(self.values, over.values)
        self.places.update(over.places)

    def set(self, path: KeyPath, value: Any, place: str) -> None:
        """Puts one value at a key path, making mappings on the way.

        Raises:
            RecipeError: if the path leads through something that has no keys.
        """
        target: Any = self.values
        for depth, key in enumerate(path[:-1]):
            target = _step(target, key, place, path[: depth + 1])
        if isinstance(target, list):
            target[_index(target, path[-1], place, path)] = value
        else:
            target[path[-1]] = value
        self.places[path] = place


def _step(target: Any, key: str, place: str, path: KeyPath) -> Any:
    if isinstance(target, list):
        return target[_index(target, key, place, path)]
    child = target.setdefault(key, {})
    if not isinstance(child, dict | list):
        raise RecipeError(
            f"{place}: {'.'.join(path)}: is {child!r} and holds no keys; set it whole"
        )
    return child


def _index(target: list[Any], key: str, place: str, path: KeyPath) -> int:
    if not key.isdigit() or int(key) >= len(target):
        raise RecipeError(
            f"{place}: {'.'.join(path)}: a list of {len(target)}; use an index below {len(target)}"
        )
    return int(key)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            _merge(under[key], value)
        else:
            under[key] = value


def read_yaml(file: Path) -> Document:
    """Parses a file whose top is a mapping.

    Raises:
        RecipeError: if it cannot be read or parsed, or a key stands twice.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{file}: is not UTF-8 text; give a YAML file") from None
    except OSError as error:
        raise RecipeError(f"{file}: {error.strerror}; give the path of a recipe") from None
    node = _compose(text, str(file))
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{file}:1: a recipe is a mapping of keys; write `name: ...` first")
    document = Document()
    document.places[()] = f"{file}:1"
    document.values = _construct(node, (), str(file), document.places)
    return document


def parse_scalar(text: str, label: str) -> Any:
    """A command line's value, read as YAML."""
    node = _compose(text, label)
    return None if node is None else _construct(node, (), label, {})


def _compose(text: str, label: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{label}:{line}: not YAML: {error.problem}; mend the line") from None
    except yaml.YAMLError as error:
        cause = str(error).splitlines()[0]
        raise RecipeError(f"{label}: not YAML: {cause}; mend the file") from None


def _construct(node: yaml.Node, path: KeyPath, file: str, places: dict[KeyPath, str]) -> Any:
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            place = f"{file}:{key_node.start_mark.line + 1}"
            if key in values:
                raise RecipeError(f"{place}: {'.'.join((*path, key))}: stands twice; remove one")
            places[(*path, key)] = place
            values[key] = _construct(value_node, (*path, key), file, places)
        return values
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[(*path, str(index))] = f"{file}:{item.start_mark.line + 1}"
        return [
            _construct(item, (*path, str(index)), file, places)
            for index, item in enumerate(node.value)
        ]
    try:
        return _Loader("").construct_object(node)
    except (ValueError, yaml.YAMLError):
        line = node.start_mark.line + 1
        raise RecipeError(f"{file}:{line}: {'.'.join(path)}: {node.value!r} is no value") from None
