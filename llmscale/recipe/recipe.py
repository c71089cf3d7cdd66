"""A recipe: parsed once into typed, immutable objects, every error found before any process.

Nothing below reads YAML or flags, and nothing here imports torch.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, NonNegativeInt, SerializeAsAny, ValidationError, create_model

from llmscale.clusters.base import ClusterSettings
from llmscale.errors import RecipeError
from llmscale.recipe.explain import explain
from llmscale.recipe.yaml_places import Document, KeyPath, parse_scalar, read_yaml
from llmscale.settings import Problem, Settings, choices, under
from llmscale.stages import KINDS
from llmscale.stages.base import RecipeView, Stage

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
RESERVED_STAGE_NAMES = ("superseded",)


class Recipe(Settings):
    """One file for the whole way: where it runs and its stages in order."""

    name: str = Field(pattern=NAME)
    seed: NonNegativeInt = 1234
    cluster: ClusterSettings = ClusterSettings()
    stages: dict[Annotated[str, Field(pattern=NAME)], SerializeAsAny[Stage]] = Field(min_length=1)

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

    def problems(self, folder: Path) -> Iterator[Problem]:
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
        view = RecipeView(self.stages, self.cluster, folder)
        for name, stage in self.stages.items():
            yield from under("stages", under(name, stage.problems(view)))

    def _link_problems(self) -> Iterator[Problem]:
        for name, stage in self.stages.items():
            for key, link in stage.links.items():
                target = getattr(stage, key)
                if target is None or (link.or_folder and Path(target).is_dir()):
                    continue
                path = ("stages", name, key)
                fitting = [other for other, s in self.stages.items() if s.kind in link.kinds]
                use = f"use {choices(fitting)}" if fitting else f"add one of kind {link.kinds[0]}"
                if target not in self.stages:
                    what = "is no stage and no folder" if link.or_folder else "is no stage"
                    yield Problem(path, f"{target!r} {what} of this recipe; {use}")
                elif self.stages[target].kind not in link.kinds:
                    kind = self.stages[target].kind
                    yield Problem(path, f"{target!r} is a stage of kind {kind}; {use}")

    def to_yaml(self) -> str:
        """The recipe as it runs, with paths made absolute and keys as a user writes them."""
        plain = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def load_recipe(file: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Reads, overrides and checks a recipe.

    Raises:
        RecipeError: one line for the first thing wrong, with its file, line, key and mend.
    """
    document = _read_with_includes(file, ())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise RecipeError(f"override {override!r}: is not KEY=VALUE; write stages.x.steps=10")
        label = f"override {override!r}"
        document.set(tuple(key.split(".")), parse_scalar(text, label), label)
    recipe = _validate(document, file.parent)
    for problem in recipe.problems(file.parent):
        raise _error(document, problem.path, problem.message)
    return recipe


def read_resolved(file: Path) -> Recipe:
    """Reads a run folder's own recipe, which was checked before it was written."""
    return _validate(read_yaml(file), file.parent)


def _read_with_includes(file: Path, trail: tuple[Path, ...]) -> Document:
    if file.resolve() in trail:
        raise RecipeError(f"{trail[-1]}: include: {file} includes itself; remove it")
    own = read_yaml(file)
    includes = own.values.pop("include", [])
    place = own.place(("include",))
    document = Document()
    for include in includes if isinstance(includes, list) else [includes]:
        if not isinstance(include, str):
            raise RecipeError(f"{place}: include: {include!r} is no path; name a YAML file")
        target = file.parent / include
        if not target.is_file():
            raise RecipeError(f"{place}: include: {target} does not exist; name a YAML file")
        document.merge(_read_with_includes(target, (*trail, file.resolve())))
    document.merge(own)
    return document


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
    kind = values.get("kind")
    if kind not in KINDS:
        cause = "is missing" if "kind" not in values else f"{kind!r} is no kind of stage"
        raise _error(document, (*path, "kind"), f"{cause}; use {choices(KINDS)}")
    try:
        return KINDS[kind].model_validate(values, context=context)
    except ValidationError as error:
        inner, message = explain(error, KINDS[kind])
        raise _error(document, (*path, *inner), message) from None


def _error(document: Document, path: KeyPath, message: str) -> RecipeError:
    return RecipeError(f"{document.place(path)}: {'.'.join(path)}: {message}")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors."""
    stage = Annotated[_union(list(KINDS.values())), Field(discriminator="kind")]
    described = create_model(
        "Recipe",
        __base__=Recipe,
        stages=(dict[str, stage], ...),  # type: ignore[valid-type]
        include=(str | list[str] | None, None),
    )
    return described.model_json_schema(by_alias=True)


def _union(types: list[type[Stage]]) -> Any:
    union: Any = types[0]
    for other in types[1:]:
        union = union | other
    return union
