"""Every key of every settings class, mistyped; every number, out of its range.

The cases are made by walking the classes, so that a new key is covered when it is added.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from llmscale.recipe.recipe import Recipe
from llmscale.recipe.yaml_places import KeyPath, read_yaml, write_yaml
from llmscale.settings import Settings
from llmscale.stages import KINDS, settings_of

NAME = "own"
"""Of what a recipe gives names to."""
STAGES = {"prepare": "corpus", "evaluate": "evaluation"}
MAY_BE_ZERO = {
    "centering",
    "coefficient",
    "entropy",
    "smoothing",
    "gpus_per_node",
    "restarts",
    "balance_coefficient",
    "seed",
    "stage",
    "sentinels",
    "validation_fraction",
    "warmup_steps",
    "minimum_learning_rate",
    "beta1",
    "beta2",
    "weight_decay",
    "gradient_clip",
}
MAY_BE_NEGATIVE = {"stages.ppo.rollout.without_end", f"stages.ppo.rewards.{NAME}.weight"}
TOO_LARGE = {
    "seed": 2**32,
    "validation_fraction": 1,
    "vocabulary_size": 2**21,
    "layers": 2**25,
    "hidden_size": 2**25,
    "attention_heads": 2**25,
    "key_value_heads": 2**25,
    "head_size": 2**25,
    "ffn_size": 2**25,
    "beta1": 1,
    "beta2": 1.0,
    "top_p": 1.1,
}


def parts(annotation: Any) -> list[Any]:
    """The annotation and all those within it."""
    return [annotation, *(part for inner in get_args(annotation) for part in parts(inner))]


def keys(
    settings: type[Settings], owner: KeyPath, seen: set[type]
) -> Iterator[tuple[KeyPath, Any]]:
    """Each key path below an owner, with its annotation; those of a class seen before left out."""
    for name, field in settings.model_fields.items():
        path = (*owner, field.alias or name)
        yield path, field.annotation
        if name == "stages":
            continue
        for part in parts(field.annotation):
            if isinstance(part, type) and issubclass(part, Settings) and part not in seen:
                seen.add(part)
                origins = [getattr(p, "__origin__", p) for p in parts(field.annotation)]
                within = ("0",) if tuple in origins else (NAME,) if dict in origins else ()
                yield from keys(part, (*path, *within), seen)
                break


def every_key() -> Iterator[tuple[KeyPath, Any]]:
    seen: set[type] = set()
    yield from keys(Recipe, (), seen)
    for kind in KINDS:
        yield from keys(settings_of(kind), ("stages", STAGES.get(kind, kind)), seen)


EVERY_KEY = list(every_key())
NUMBERS = [
    (path, float if float in parts(annotation) else int)
    for path, annotation in EVERY_KEY
    if {int, float} & {part for part in parts(annotation) if isinstance(part, type)}
]


def wrong_numbers() -> Iterator[tuple[KeyPath, str]]:
    for path, kind in NUMBERS:
        listed = path[-1] == "layers_per_stage"
        texts = ["many", "true", "{}", ".nan", ".inf", "-.inf", "9" * 30, "'5'"]
        texts += [] if kind is float else ["1.5", "1e400"]
        if dotted(path) not in MAY_BE_NEGATIVE:
            texts += ["-1"] if path[-1] in MAY_BE_ZERO else ["-1", "0"]
        texts += [str(TOO_LARGE[path[-1]])] if path[-1] in TOO_LARGE else []
        for text in texts:
            yield path, f"[{text}]" if listed else text


def dotted(path: KeyPath) -> str:
    return ".".join(path)


def owner_of(plain: Any, path: KeyPath) -> Any:
    """The mapping a key stands in, made where the recipe leaves it out."""
    for key in path[:-1]:
        plain = plain[int(key)] if isinstance(plain, list) else plain.setdefault(key, {})
    return plain


@pytest.fixture(scope="module")
def plain(quickstart: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("plain") / "x.yaml"
    file.write_text(quickstart, encoding="utf-8")
    values = read_yaml(Path(file)).values
    training = values["stages"]["pretrain"]
    training["batch"]["ramp"] = {"start": 8, "increment": 8, "samples": 100}
    training["curriculum"] = [{}]
    for kind in ("finetune", "reward", "dpo", "ppo"):
        values["stages"][kind] = {
            "kind": kind,
            "start_from": "pretrain",
            "data": {NAME: {"path": str(file)}},
            "batch": {"global": 8, "micro": 1},
            "optimizer": {"learning_rate": 1e-3},
            "steps": 10,
        }
    values["stages"]["reward"]["data"][NAME]["compare"] = {"difference": 1.0}
    values["stages"]["ppo"] |= {
        "rewards": {NAME: {"url": "http://127.0.0.1:1/"}},
        "rollout": {"prompts": 8, "max_new_tokens": 4},
    }
    values["stages"]["finetune"]["quantization_aware"] = {"scheme": "int8-weight"}
    values["stages"]["quantize"] = {
        "kind": "quantize",
        "model": "pretrain",
        "scheme": "int8-weight",
    }
    values["stages"]["compare"] = {
        "kind": "compare",
        "model": "pretrain",
        "schemes": ["int8-weight"],
        "measured_on": {"text": str(file)},
    }
    return values


def test_the_walk_reaches_the_depths() -> None:
    found = {dotted(path) for path, _ in EVERY_KEY}
    assert {"cluster.on", "stages.corpus.sources.0.path", "stages.pretrain.batch.global"} <= found
    assert {"stages.evaluation.samples.top_p", "stages.pretrain.health.timeout_seconds"} <= found
    assert {path[-1] for path, _ in NUMBERS} >= MAY_BE_ZERO | set(TOO_LARGE)


@pytest.mark.parametrize("path", [path for path, _ in EVERY_KEY], ids=dotted)
def test_a_mistyped_key_is_answered_with_the_nearest_one(
    plain: dict[str, Any], says: Any, path: KeyPath
) -> None:
    key, mistyped = path[-1], path[-1] + path[-1][-1]
    spoilt = copy.deepcopy(plain)
    owner = owner_of(spoilt, path)
    owner[mistyped] = owner.pop(key, 1)
    text = write_yaml(spoilt)
    line = 1 + next(n for n, row in enumerate(text.splitlines()) if f"{mistyped}:" in row)
    wrong = dotted((*path[:-1], mistyped))
    assert says(text) == f"x.yaml:{line}: {wrong}: unknown key; use {key}"


@pytest.mark.parametrize(
    ("path", "number"),
    list(wrong_numbers()),
    ids=lambda part: dotted(part) if isinstance(part, tuple) else part,
)
def test_a_number_out_of_range_is_answered_with_its_line_and_a_mend(
    plain: dict[str, Any], says: Any, path: KeyPath, number: str
) -> None:
    spoilt = copy.deepcopy(plain)
    owner_of(spoilt, path)[path[-1]] = "THE NUMBER"
    text = write_yaml(spoilt)
    line = 1 + next(n for n, row in enumerate(text.splitlines()) if "THE NUMBER" in row)
    said = says(text.replace("THE NUMBER", number))
    assert said.startswith(f"x.yaml:{line}: {dotted(path)}")
    cause, mend = said.split("; ", 1)
    assert " is " in cause
    assert mend.startswith(("use ", "give ", "write ", "remove "))
