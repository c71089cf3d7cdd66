"""A wrong recipe is answered with one line: its place, its key, the cause and the mend."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml

from llmscale.recipe import recipe as recipe_module
from llmscale.stages.base import Link, Stage

TABLE = yaml.safe_load(Path(__file__).with_name("wrong_recipes.yaml").read_text(encoding="utf-8"))
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{former}'] * 9)}]\n"
    for former, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def spoilt(quickstart: str, replace: str, by: str) -> str:
    assert replace in quickstart
    return quickstart.replace(replace, by, 1)


@pytest.mark.parametrize("name", TABLE["edits"])
def test_a_wrong_recipe_is_answered_with_place_key_cause_and_mend(
    quickstart: str, says: Any, name: str
) -> None:
    edit = TABLE["edits"][name]
    assert says(spoilt(quickstart, edit["replace"], edit["by"])) == edit["says"]


@pytest.mark.parametrize("override", TABLE["overrides"])
def test_a_wrong_override_is_answered_with_itself_as_the_place(
    quickstart: str, says: Any, override: str
) -> None:
    assert says(quickstart, [override]) == TABLE["overrides"][override]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "x.yaml:1: the file is empty; "),
        (b"# nothing\n", "x.yaml:1: the file is empty; "),
        (b"5\n", "x.yaml:1: a recipe is a mapping of keys; "),
        (b"- name: x\n", "x.yaml:1: a recipe is a mapping of keys; "),
        (b"null\n", "x.yaml:1: a recipe is a mapping of keys; "),
        (b"name: x\nseed: 1 # caf\xe9\n", "x.yaml:2: is not UTF-8 text; "),
        ("name: x\n".encode("utf-16"), "x.yaml:1: is not UTF-8 text; "),
        (b"name: " + b"x" * 300_000, "x.yaml: is above 256 KiB; "),
        (b"name: x\nstages: {}\n", "x.yaml:2: stages: is empty; "),
        (b"\xef\xbb\xbfname: x\nstages: 5\n", "x.yaml:2: stages: 5 is no mapping of keys; "),
        (b"name: x\n", "x.yaml:1: stages: is missing; "),
        (b'name: "\\ud800"\n', "x.yaml:1: name: '\\ud800' holds half a character; "),
        (b'name: x\nstages: {"a\\u2028b": 5}\n', "x.yaml:2: stages.a\\u2028b: a stage is a map"),
        (b"seed: " + b"9" * 5000, "x.yaml:1: seed: '9999"),
        (b"seed: 0x" + b"f" * 5000, "x.yaml:1: seed: '0xff"),
        (b"[" * 5000, "x.yaml:1: not YAML: it nests too deep; "),
        (b"- " * 5000, "x.yaml:1: not YAML: it nests too deep; "),
        (b"a: " + b"{a: " * 500, "x.yaml:1: not YAML: it nests too deep; "),
        (LAUGHS.encode(), "x.yaml:1: holds too many values, or itself; "),
        (b"name: x\nstages: {a: &a {kind: *a}}\n", "x.yaml:2: holds too many values, or itself; "),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_within_a_second(
    says: Any, content: bytes, line: str
) -> None:
    started = time.process_time()
    assert says(content).startswith(line)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("nowhere.yaml", "No such file or directory; give the path of a recipe"),
        ("", "Is a directory; give the path of a recipe"),
        ("x" * 300, "File name too long; give the path of a recipe"),
        ("a\0b", "no path holds a zero byte; give the path of a recipe"),
        ("loop", "Too many levels of symbolic links; give the path of a recipe"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, path: str, line: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(recipe_module.RecipeError, match=f"{line}$"):
        recipe_module.load_recipe(tmp_path / path)


class Looped(Stage):
    kind: Literal["looped"]
    needs: str
    links: ClassVar[Any] = {"needs": Link(("looped",))}


@pytest.mark.parametrize(
    ("stages", "line"),
    [
        ("a: {kind: looped, needs: a}", "stages.a: stages need each other in a circle (a -> a)"),
        (
            "a: {kind: looped, needs: b}\n  b: {kind: looped, needs: c}\n"
            "  c: {kind: looped, needs: b}",
            "stages.b: stages need each other in a circle (b -> c -> b); cut one link",
        ),
    ],
)
def test_stages_that_need_each_other_in_a_circle_are_refused(
    monkeypatch: pytest.MonkeyPatch, says: Any, stages: str, line: str
) -> None:
    monkeypatch.setattr(recipe_module, "KINDS", ("looped",))
    monkeypatch.setattr(recipe_module, "settings_of", lambda _kind: Looped)
    assert line in says(f"name: x\nstages:\n  {stages}\n")


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ("[1]", "is no JSON mapping"),
        ("{", "is no JSON mapping"),
        ("[" * 100_000, "is no JSON mapping"),
        ("{}", "model_type null is not supported"),
        ('{"model_type": ["llama"]}', 'model_type ["llama"] is not supported'),
        ('{"model_type": "gpt2"}', "n_layer is missing"),
        ('{"model_type": "llama"}', "num_hidden_layers is missing"),
        ('{"model_type": "llama", "rope_scaling": 5}', "a value is of the wrong type"),
        ('{"model_type": "llama", "hidden_act": "relu"}', "hidden_act 'relu' is not supported"),
        (
            '{"model_type": "gpt2", "n_layer": "12", "n_embd": 8, "n_head": 2, "n_positions": 8}',
            "layers cannot be '12'",
        ),
    ],
)
def test_a_folder_to_start_from_that_holds_no_usable_model_is_refused(
    quickstart: str, says: Any, tmp_path: Path, config: str, cause: str
) -> None:
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    begin, end = quickstart.index("    model:\n"), quickstart.index("    parallel:")
    text = f"{quickstart[:begin]}    start_from: .\n{quickstart[end:]}"
    assert says(text).startswith(f"x.yaml:19: stages.pretrain.start_from: config.json: {cause}")


@pytest.mark.parametrize(
    ("replace", "by"),
    [
        ("layers: 4", "leyers: 4"),
        ("tensor: 2", "tensor: 3"),
        ("corpus: corpus", "corpus: copus"),
        ("*.txt", "*.text"),
        ("seed: 1234", "seed: 1234\nseed: 5"),
        ("name: quickstart", "name: quick\tstart: {"),
    ],
)
def test_the_command_ends_with_2_and_one_line_and_writes_nothing(
    quickstart: str, tmp_path: Path, replace: str, by: str
) -> None:
    recipe = tmp_path / "x.yaml"
    recipe.write_text(spoilt(quickstart, replace, by), encoding="utf-8")
    command = [sys.executable, "-m", "llmscale", "run", str(recipe)]
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"{recipe}:")
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == [recipe]
