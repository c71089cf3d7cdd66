"""A recipe: parsed once into typed, immutable objects, every error found before any process.

Nothing below reads YAML or flags, and nothing here imports torch.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, SerializeAsAny, ValidationError, create_model

from llmscale.clusters.base import ClusterSettings
from llmscale.errors import RecipeError
from llmscale.recipe.explain import explain, nearest_key
from llmscale.recipe.sweep import (
    Sweep,
    key_path,
    member_documents,
    sweep_problems,
    value_at,
    with_paths_resolved,
)
from llmscale.recipe.yaml_places import Document, KeyPath, parse_value, read_yaml, write_yaml
from llmscale.settings import Name, Problem, Settings, choices, shown, under
from llmscale.stages import KINDS, settings_of
from llmscale.stages.base import Link, RecipeView, Stage, is_file, is_folder

RESERVED_STAGE_NAMES = ("code", "ray", "slurm", "superseded", "sweep")


class Recipe(Settings):
    """One file for the whole way: where it runs and its stages in order.

    ``sweep`` gives key paths lists of values; the recipe runs once for each combination.
    """

    name: Name
    seed: int = Field(default=1234, ge=0, lt=2**32)
    cluster: ClusterSettings = ClusterSettings()
    stages: dict[Name, SerializeAsAny[Stage]] = Field(min_length=1, max_length=100)
    sweep: Sweep | None = None

    keys_read_before: ClassVar[tuple[str, ...]] = ("include",)

    def order(self) -> list[str]:
        """The stages' names, each after those it needs, else as written.

        Raises:
            ValueError: if stages need each other in a circle; the message is the circle.
        """
        ordered: list[str] = []

        def visit(name: str, trail: tuple[str, ...]) -> None:
            if name in trail:
                raise ValueError(" -> ".join((*trail[trail.index(name) :], name)))
            if name not in ordered:
                for needed in self.stages[name].linked(self.stages).values():
                    visit(needed, (*trail, name))
                ordered.append(name)

        for name in self.stages:
            visit(name, ())
        return ordered

    def problems(self) -> Iterator[Problem]:
        """All that types do not catch: links, cycles, and each stage's own checks."""
        for name in self.stages:
            if name in RESERVED_STAGE_NAMES:
                yield Problem(("stages", name), "the name is taken; choose another")
        links = list(self._link_problems())
        yield from links
        if links:
            return
        try:
            self.order()
        except ValueError as circle:
            first = str(circle).split(" -> ")[0]
            yield Problem(
                ("stages", first), f"stages need each other in a circle ({circle}); cut one link"
            )
            return
        if self.cluster.on == "local" and self.cluster.nodes > 1:
            yield Problem(
                ("cluster", "nodes"), f"local has one node, not {self.cluster.nodes}; use 1"
            )
        view = RecipeView(self.stages, self.cluster)
        for name, stage in self.stages.items():
            yield from under("stages", under(name, stage.problems(view)))
        yield from sweep_problems(self.sweep or {}, self.stages)

    def members(self) -> list["Recipe"]:
        """The recipes that the sweep stands for, by number; none without a sweep."""
        document = Document(self._plain())
        found = member_documents(document, self.sweep) if self.sweep else ()
        return [_validate(member, Path()) for _chosen, member in found]

    def imports(self) -> list[str]:
        """What the ranks of the stages import that takes long."""
        return sorted({module for stage in self.stages.values() for module in stage.imports()})

    def _link_problems(self) -> Iterator[Problem]:
        for name, stage in self.stages.items():
            for path, target, link in stage.named():
                cause = self._misfit(target, link)
                if cause is not None:
                    others = [
                        other
                        for other, candidate in self.stages.items()
                        if candidate.kind in link.kinds and other != name
                    ]
                    use = f"use {choices(others)}" if others else f"add one of kind {link.kinds[0]}"
                    message = f"{shown(target, most=500)} {cause}; {use}"
                    yield Problem(("stages", name, *path), message)

    def _misfit(self, target: str, link: Link) -> str | None:
        if target in self.stages:
            kind = self.stages[target].kind
            return None if kind in link.kinds else f"is a stage of kind {kind}"
        if not link.or_folder:
            return "is no stage of this recipe"
        if not is_folder(target):
            return "is no stage of this recipe, and no folder"
        if any(is_file(str(Path(target, file))) for file in link.folder_holds):
            return None
        return f"is a folder without {choices(link.folder_holds)}"

    def to_yaml(self) -> str:
        """The recipe as it runs, with paths made absolute and keys as a user writes them."""
        return write_yaml(self._plain())

    def _plain(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def load_recipe(file: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Reads, overrides and checks a recipe.

    Raises:
        RecipeError: one line for the first thing wrong, with its file, line, key and mend.
    """
    try:
        document = _read_with_includes(file, ())
        for override in overrides:
            _apply(document, override)
        recipe = _checked(document, file.parent)
        if recipe.sweep is None:
            return recipe
        sweep = _checked_sweep(document, recipe.sweep, file.parent)
        return recipe.model_copy(update={"sweep": sweep})
    except RecipeError as error:
        raise RecipeError(_one_line(str(error))) from None


def read_resolved(file: Path) -> Recipe:
    """Reads a run folder's own recipe, which was checked before it was written."""
    return _validate(read_yaml(file), file.parent)


def _checked(document: Document, folder: Path) -> Recipe:
    recipe = _validate(document, folder)
    for problem in recipe.problems():
        raise _error(document, problem.path, problem.message)
    return recipe


def _checked_sweep(
    document: Document, sweep: Mapping[str, tuple[Any, ...]], folder: Path
) -> dict[str, tuple[Any, ...]]:
    """Checks every member as a recipe; returns the sweep with its paths made absolute."""
    found = {key: list(values) for key, values in sweep.items()}
    for chosen, member in member_documents(document, sweep):
        read = _checked(member, folder)._plain()
        for (key, values), at in zip(sweep.items(), chosen, strict=True):
            found[key][at] = with_paths_resolved(values[at], value_at(read, key_path(key)))
    return {key: tuple(values) for key, values in found.items()}


def _apply(document: Document, override: str) -> None:
    key, equals, text = override.partition("=")
    label = f"override {shown(override)}"
    path = key_path(key)
    if not equals or not all(path):
        raise RecipeError(f"{label}: is not KEY=VALUE; write it like stages.pretrain.steps=10")
    if path[0] == "include":
        raise RecipeError(f"{label}: include stands in files only; write it into the recipe")
    if path[0] == "sweep" and len(path) > 1:  # what follows is one key, of a sweep
        path = ("sweep", key.removeprefix("sweep."))
    document.set(path, parse_value(text, label), label)


def _read_with_includes(file: Path, trail: tuple[str, ...]) -> Document:
    own = read_yaml(file)
    written = own.values.pop("include", [])
    includes = written if isinstance(written, list) else [written]
    trail = (*trail, os.path.realpath(file))
    document = Document()
    for index, include in enumerate(includes):
        target = file.parent / str(include)
        cause = _include_problem(include, target, trail)
        if cause is not None:
            path = ("include", str(index)) if includes is written else ("include",)
            raise _error(own, path, f"{cause}; name another YAML file")
        document.merge(_read_with_includes(target, trail))
    document.merge(own)
    return document


def _include_problem(include: Any, target: Path, trail: tuple[str, ...]) -> str | None:
    if not isinstance(include, str):
        return f"{shown(include)} is no path"
    if not is_file(str(target)):
        return f"{target} is no file"
    if os.path.realpath(target) in trail:
        return f"{target} includes this file in turn"
    return None


def _validate(document: Document, folder: Path) -> Recipe:
    values = dict(document.values)
    stages = values.get("stages")
    if isinstance(stages, dict):
        context = {"folder": folder, "stages": frozenset(stages)}
        values["stages"] = {
            name: _validate_stage(document, name, stage, context) for name, stage in stages.items()
        }
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        path, message = explain(error, Recipe)
        raise _error(document, path, message) from None


def _validate_stage(document: Document, name: str, values: Any, context: Any) -> Stage:
    path = ("stages", name)
    if not isinstance(values, dict):
        raise _error(document, path, "a stage is a mapping; begin it with `kind: ...`")
    settings = settings_of(_kind(document, name, values))
    try:
        return settings.model_validate(values, context=context)
    except ValidationError as error:
        inner, message = explain(error, settings)
        raise _error(document, (*path, *inner), message) from None


def _kind(document: Document, name: str, values: dict[str, Any]) -> str:
    path = ("stages", name, "kind")
    if "kind" in values:
        kind = values["kind"]
        if isinstance(kind, str) and kind in KINDS:
            return kind
        raise _error(document, path, f"{shown(kind)} is no kind of stage; use {choices(KINDS)}")
    if mistyped := nearest_key("kind", values):
        raise _error(document, ("stages", name, mistyped), "unknown key; use kind")
    near = nearest_key(name, [other for other in document.values["stages"] if other != name])
    mend = f"use {choices(KINDS)}" + (f", or name the stage {near}" if near else "")
    raise _error(document, path, f"is missing; {mend}")


def _error(document: Document, path: KeyPath, message: str) -> RecipeError:
    key = f"{'.'.join(path)}: " if path else ""
    return RecipeError(f"{document.place(path)}: {key}{message}")


def _one_line(text: str) -> str:
    return "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in text
    )


def json_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors."""
    every = _union([settings_of(kind) for kind in KINDS])
    stage: Any = Annotated[every, Field(discriminator="kind")]
    described = create_model(
        "Recipe",
        __base__=Recipe,
        stages=(dict[Name, stage], ...),
        include=(str | list[str] | None, None),
    )
    return described.model_json_schema(by_alias=True)


def _union(types: list[type[Stage]]) -> Any:
    union: Any = types[0]
    for other in types[1:]:
        union = union | other
    return union
