"""YAML as plain data, with the file and line of every key.

The scalars are those of YAML 1.2's core schema: ``on`` and ``no`` are words, ``1e-3`` is
a number. Whatever a file holds, it gives plain data of a bounded size or one ``RecipeError``.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmscale.errors import RecipeError
from llmscale.settings import choices, shown

KeyPath = tuple[str, ...]
Place = Callable[[int], str]
"""How an error names a line."""

MOST_BYTES = 256 * 1024
MOST_LEVELS = 40
MOST_VALUES = 10_000
LARGEST_NUMBER = 2**63 - 1
TOO_DEEP = "it nests too deep"

CORE_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


class _Loader(yaml.SafeLoader):
    """A safe loader with YAML 1.2's scalars and a bound on nesting."""

    levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Composes one node, and those in it."""
        self.levels += 1
        if self.levels > MOST_LEVELS:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=TOO_DEEP, problem_mark=mark)
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """A safe dumper that quotes what YAML 1.2 would not read as a word."""

    def ignore_aliases(self, data: Any) -> bool:
        """Every value is written out where it stands."""
        return True


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text on one line, with escapes for what other styles of YAML would fold or lose."""
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text_node)

for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _name, _pattern, _first in CORE_SCALARS:
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), list(_first)
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
        self._merge(self.values, over.values, ())
        self.places.update(over.places)

    def _merge(self, under: dict[str, Any], over: dict[str, Any], path: KeyPath) -> None:
        for key, value in over.items():
            if isinstance(value, dict) and isinstance(under.get(key), dict):
                self._merge(under[key], value, (*path, key))
                continue
            if key in under:
                self._forget_places_in((*path, key))
            under[key] = value

    def set(self, path: KeyPath, value: Any, place: str) -> None:
        """Puts one value at a key path, making mappings on the way.

        Raises:
            RecipeError: if the path leads through something that has no keys.
        """
        target: Any = self.values
        for depth, key in enumerate(path):
            here = path[: depth + 1]
            at = _position(target, key, place, here)
            if depth == len(path) - 1:
                target[at] = value
            elif isinstance(target, dict) and target.get(key) is None:
                target[key] = {}
                self.places[here] = place
            target = target[at]
        self._forget_places_in(path)
        self.places[path] = place

    def _forget_places_in(self, path: KeyPath) -> None:
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]


def _position(target: Any, key: str, place: str, path: KeyPath) -> str | int:
    """What stands for a key in a mapping or a list."""
    if isinstance(target, dict):
        return key
    if not isinstance(target, list):
        owner = ".".join(path[:-1])
        cause = f"is {shown(target)}, which holds no keys"
        raise RecipeError(f"{place}: {owner}: {cause}; set {owner} whole")
    if key.isdecimal() and int(key[:9]) < len(target):
        return int(key[:9])
    mend = f"use {choices(range(len(target))[:5])}" if target else "set the list whole"
    raise RecipeError(f"{place}: {'.'.join(path)}: is no place in a list of {len(target)}; {mend}")


def read_yaml(file: Path) -> Document:
    """Parses a file whose top is a mapping.

    Raises:
        RecipeError: if it cannot be read or parsed, or a key stands twice.
    """

    def at(line: int) -> str:
        return f"{file}:{line}"

    node = _compose(_read_text(file), at)
    if node is None:
        raise RecipeError(f"{at(1)}: the file is empty; write `name: ...` and `stages: ...`")
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{at(1)}: a recipe is a mapping of keys; write `name: ...` first")
    document = Document()
    document.places[()] = at(1)
    document.values = _construct(node, (), at, document.places)
    return document


def parse_value(text: str, label: str) -> Any:
    """A command line's value, read as YAML.

    Raises:
        RecipeError: if it is not YAML.
    """

    def at(_: int) -> str:
        return label

    node = _compose(text, at)
    return None if node is None else _construct(node, (), at, {})


def write_yaml(values: dict[str, Any]) -> str:
    """Plain data as text that ``read_yaml`` reads as the same data."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read_text(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "no path holds a zero byte"
        raise RecipeError(f"{file}: {cause}; give the path of a recipe") from None
    if len(content) > MOST_BYTES:
        raise RecipeError(f"{file}: is above {MOST_BYTES // 1024} KiB; give the path of a recipe")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{file}:{line}: is not UTF-8 text; save it as UTF-8") from None


def _compose(text: str, at: Place) -> yaml.Node | None:
    line = 1
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        finally:
            line = loader.line + 1
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else line
        raise RecipeError(f"{at(line)}: not YAML: {_in_words(error)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        cause = f"character {shown(text[error.position])} is not allowed"
        raise RecipeError(f"{at(line)}: not YAML: {cause}; remove it") from None
    except (ValueError, OverflowError):
        raise RecipeError(f"{at(line)}: not YAML: \\U names no character; mend it") from None


def _in_words(error: yaml.MarkedYAMLError) -> str:
    problem = (error.problem or "it cannot be parsed").removeprefix("but ")
    if "\\t" in problem:
        return "a tab stands where spaces must; indent with spaces"
    if "another document" in problem:
        return "a second document begins; keep one, and remove the line ---"
    if problem == TOO_DEEP:
        return f"{problem}; use at most {MOST_LEVELS} levels"
    if "<block end>" in problem:
        problem = "the indentation is wrong, or a quote or bracket"
    begun, ended = error.context_mark, error.problem_mark
    if begun is None or ended is None or begun.line == ended.line:
        return f"{problem}; mend it"
    return f"{problem}; mend it, or what begins at line {begun.line + 1}"


def _construct(node: yaml.Node, path: KeyPath, at: Place, places: dict[KeyPath, str]) -> Any:
    place = at(node.start_mark.line + 1)
    if len(path) > MOST_LEVELS or len(places) > MOST_VALUES:
        raise RecipeError(f"{place}: holds too many values, or itself; remove the aliases (*name)")
    if isinstance(node, yaml.MappingNode):
        return _construct_mapping(node, path, at, places)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[(*path, str(index))] = at(item.start_mark.line + 1)
        return [
            _construct(item, (*path, str(index)), at, places)
            for index, item in enumerate(node.value)
        ]
    try:
        return _scalar(node.tag.removeprefix("tag:yaml.org,2002:"), node.value)
    except ValueError as error:
        key = f"{'.'.join(path)}: " if path else ""
        raise RecipeError(f"{place}: {key}{shown(node.value)} {error}") from None


def _construct_mapping(
    node: yaml.MappingNode, path: KeyPath, at: Place, places: dict[KeyPath, str]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = at(key_node.start_mark.line + 1)
        key = key_node.value
        if not isinstance(key, str):
            raise RecipeError(f"{place}: a key is a list or a mapping; write it as one word")
        inner = (*path, key)
        if key in values:
            raise RecipeError(f"{place}: {'.'.join(inner)}: stands twice; remove one")
        if key == "<<":
            raise RecipeError(
                f"{place}: {'.'.join(inner)}: merge keys are not in YAML 1.2; "
                "write the keys out, or put them in a file and include it"
            )
        places[inner] = place
        values[key] = _construct(value_node, inner, at, places)
    return values


def _scalar(kind: str, text: str) -> Any:
    """A scalar of YAML 1.2's core schema.

    Raises:
        ValueError: if the text is none; the message is the cause and the mend.
    """
    patterns = {name: pattern for name, pattern, _ in CORE_SCALARS}
    if kind not in ("str", *patterns):
        raise ValueError("has a tag that recipes do not know; remove the tag")
    if kind == "str":
        return _whole_characters(text)
    if not re.fullmatch(patterns[kind], text):
        raise ValueError(f"is no {kind}; remove the tag")
    match kind:
        case "bool":
            return text.lower() == "true"
        case "null":
            return None
        case "int":
            return _whole_number(text)
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _whole_characters(text: str) -> str:
    """The text with JSON's pairs of escapes, such as ``\\ud83d\\ude00``, made one character."""
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise ValueError("holds half a character; write the whole one") from None


def _whole_number(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    digits = text.lstrip("+-0ox") if base == 10 else text[2:]
    number = int(text, base) if len(digits) <= 22 else LARGEST_NUMBER + 1
    if abs(number) > LARGEST_NUMBER:
        raise ValueError(f"is too large; use at most {LARGEST_NUMBER}")
    return number
