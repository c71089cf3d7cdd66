"""``llmscale evaluate`` and ``kind: evaluate`` on a small model, whole."""

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from llmscale import evaluate_command as command
from llmscale.artifacts import RunFolder
from llmscale.errors import MachineError, RecipeError
from llmscale.evaluate_display import lines
from llmscale.evaluation.models import load_model
from llmscale.evaluation.packages import NEEDED
from llmscale.progress import Progress
from llmscale.recipe.recipe import load_recipe
from llmscale.report.report import write_report
from llmscale.stages.base import Workspace
from tests.models_on_disk import small_llama

RECORDS = [
    {"text": "what is up?", "label": "sky", "who": "a"},
    {"text": "what is down?", "label": "sea", "who": "b"},
    {"text": "what is up and down?", "label": "sea", "who": "a"},
    {"text": "add one and two: what is up?", "label": "sky", "who": "b"},
]
REFERENCES = [
    {"prompt": "what is up?", "response": "the sky;"},
    {"prompt": "what is down?", "references": ["the sea.", "sea"]},
]
TASK = """
task: sky_or_sea
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/labelled.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["the sky", "the sea"]
doc_to_target: "{{['sky', 'sea'].index(label)}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and the files it is measured on."""
    folder = tmp_path_factory.mktemp("home")
    small_llama(folder / "model")
    for name, records in (("labelled", RECORDS), ("references", REFERENCES)):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(one) + "\n" for one in records))
    (folder / "text.txt").write_text("what is up? the sky; what is down? the sea.")
    (folder / "task.yaml").write_text(TASK.replace("FOLDER", str(folder)))
    return folder


def evaluated(home: Path, **asked: dict) -> dict:
    options: dict = {"perplexity": {}, "classification": {}, "generation": {}, "tasks": {}}
    options["perplexity"] = {"texts": None, "window": None, "stride": None}
    measures = command.measures(**{**options, **asked}, max_new_tokens=6)
    return command.evaluate(str(home / "model"), measures, 1234, Console(stderr=True))


def test_all_measures_of_the_command_are_told_in_lines(home: Path) -> None:
    figures = evaluated(
        home,
        perplexity={"texts": [home / "text.txt"], "window": None, "stride": None},
        classification={
            "path": home / "labelled.jsonl",
            "template": "{text} the",
            "perturbations": ["typos", "word_swaps"],
            "group": "who",
        },
        generation={"path": home / "references.jsonl"},
    )
    labelled = figures["classification"][str(home / "labelled.jsonl")]
    assert set(labelled["perturbations"]) == {"typos", "word_swaps"}
    assert set(labelled["groups"]) == {"a", "b"}
    assert sum(sum(row.values()) for row in labelled["confusion"].values()) == 4
    text = "\n".join(lines(json.loads(json.dumps(figures))))
    told = ("text.txt: perplexity", "calibration error", "typos: accuracy", "accuracy gap", "bleu")
    assert [words for words in told if words not in text] == []


@pytest.mark.parametrize("answer", ["greedy", "chain_of_thought", "self_consistency"])
def test_generated_answers_are_the_same_again(home: Path, answer: str) -> None:
    asked = {
        "path": home / "labelled.jsonl",
        "examples": home / "labelled.jsonl",
        "shots": 1,
        "answer": answer,
        "labels": ["sky=sky", "sea=sea", "a=a", "e=e"],
        "votes": 3,
    }
    once, again = (evaluated(home, classification=asked) for _ in range(2))
    assert once == again
    (figures,) = once["classification"].values()
    assert figures["texts"] == 4
    assert ("calibration_error" in figures) == (answer == "self_consistency")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "nothing to measure; give --text"),
        ({"classification": {"template": "{text}"}}, "--template: goes with --classification"),
        ({"classification": {"path": "none.jsonl"}}, "--classification: "),
        ({"classification": {"path": "x", "labels": ["good"]}}, "--label: 'good' is no NAME=TEXT"),
        ({"classification": {"path": "x", "shots": 2}}, "--shots: goes with --examples"),
        ({"classification": {"path": "x", "votes": 0}}, "--votes: 0 is too small; use"),
        ({"classification": {"path": "x", "perturbations": ["rain"]}}, "--perturb: 'rain' is no"),
        ({"classification": {"path": "x", "template": "text"}}, "--template: takes no field"),
        ({"generation": {"path": "none.jsonl"}}, "--generation: "),
        ({"tasks": {"folder": "tasks"}}, "--task-folder: goes with --tasks"),
        ({"tasks": {"names": "a", "folder": "none"}}, "--task-folder: "),
        ({"perplexity": {"texts": None, "window": 8, "stride": None}}, "--window: goes with"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_call_is_answered_with_the_option(home: Path, asked: dict, says: str) -> None:
    with pytest.raises(RecipeError) as error:
        evaluated(home, **asked)
    assert str(error.value).startswith(says)


def test_a_package_that_is_missing_is_named_with_its_command(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NEEDED, "generation", ("there_is_no_such_package",))
    with pytest.raises(MachineError, match=r"there_is_no_such.* pip install 'llmscale\[evaluatio"):
        evaluated(home, generation={"path": home / "references.jsonl"})


RECIPE = """
name: measured
cluster: {device: cpu}
stages:
  evaluation:
    kind: evaluate
    model: model
    perplexity: {text: text.txt}
    classification:
      place: {path: labelled.jsonl, template: "{text} the", perturbations: [case], group: who}
    generation:
      answers: {path: references.jsonl, max_new_tokens: 6}
    tasks: {names: [sky_or_sea], folder: .}
"""


def test_a_stage_measures_what_the_command_does_and_reports_it(home: Path) -> None:
    (home / "x.yaml").write_text(RECIPE)
    recipe = load_recipe(home / "x.yaml", [])
    run = RunFolder(home / "run")
    folder = run.stage("evaluation")
    folder.update_manifest(stage="evaluation", status="finished")
    run.recipe_file.write_text(recipe.to_yaml())
    stage = recipe.stages["evaluation"]
    stage.run(
        "run",
        Workspace(
            folder=folder,
            inputs={"model": home / "model"},
            seed=1234,
            device="cpu",
            progress=Progress(folder.progress_file),
        ),
    )
    found = folder.manifest()["metrics"]
    asked = {
        "path": home / "labelled.jsonl",
        "template": "{text} the",
        "perturbations": ["case"],
        "group": "who",
    }
    same = evaluated(home, classification=asked, generation={"path": home / "references.jsonl"})
    assert [found["classification"]["place"]] == list(same["classification"].values())
    assert [found["generation"]["answers"]] == list(same["generation"].values())
    told = (folder.path / "classification-place.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in told] == [one["label"] for one in RECORDS]
    assert found["tasks"]["sky_or_sea"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
    page = write_report(run).read_text()
    assert "Reliability of place" in page and "Confusion of place" in page
    assert "classification, place, accuracy interval" in page
    assert "{&#39;samples" not in page


def test_a_malformed_record_stops_the_recipe_before_anything_starts(home: Path) -> None:
    (home / "bad.jsonl").write_text('{"text": "a", "label": "sky", "who": "a"}\n{"text": "b"}\n')
    (home / "x.yaml").write_text(RECIPE.replace("labelled.jsonl", "bad.jsonl"))
    with pytest.raises(RecipeError) as error:
        load_recipe(home / "x.yaml", [])
    assert f"stages.evaluation.classification.place: {home}/bad.jsonl:2: missing field" in str(
        error.value
    )


@pytest.mark.slow
def test_tasks_give_the_numbers_of_the_harness_own_command(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = evaluated(home, tasks={"names": "sky_or_sea", "folder": home})["tasks"]
    from lm_eval.__main__ import cli_evaluate

    arguments = ["lm_eval", "run", "--model", "hf", "--tasks", "sky_or_sea", "--device", "cpu"]
    arguments += ["--model_args", f"pretrained={home / 'model'}", "--include_path", str(home)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--output_path", str(tmp_path / "out")])
    cli_evaluate()
    (file,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]["sky_or_sea"]
    assert ours["sky_or_sea"].keys() == {"acc,none", "acc_norm,none"} | {
        "acc_stderr,none",
        "acc_norm_stderr,none",
    }
    assert {key: theirs[key] for key in ours["sky_or_sea"]} == ours["sky_or_sea"]


def test_a_task_that_is_not_there_is_named(home: Path) -> None:
    from llmscale.evaluation.harness import harness_figures

    model, tokenizer = load_model(home / "model")
    with pytest.raises(RecipeError, match=r"'no_such_task' is no task .*, and none in "):
        harness_figures(model, tokenizer, ["no_such_task"], home)
