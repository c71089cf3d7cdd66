"""``llmscale plan`` as a user runs it."""

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llmscale.planning import calibration
from llmscale.planning.constants import Constants
from llmscale.planning.hardware import measured_cpu
from llmscale.plans import memory_warnings, plan_recipe
from llmscale.recipe.recipe import load_recipe
from tests.called import llmscale
from tests.conftest import PRETRAINING, QUICKSTART, ROOT
from tests.verify.test_command import PARAMETERS

GPT3 = ROOT / "recipes" / "gpt3-175b-1024xa100.yaml"
LLAMA3 = ROOT / "recipes" / "llama3-8b-64xh100.yaml"


def plan(*arguments: object) -> subprocess.CompletedProcess[str]:
    return llmscale("plan", *arguments)


def answer(*arguments: object) -> dict:
    done = plan(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def processor_seconds(*arguments: object) -> float:
    """Of the command, however busy the machine is."""
    command = [sys.executable, "-m", "llmscale", "plan", *map(str, arguments)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime


@pytest.mark.parametrize("recipe", PRETRAINING, ids=lambda path: path.stem)
def test_every_shipped_recipe_has_the_parameters_that_verify_counts(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    device = replace(measured_cpu(size=32, repeats=1), generation="cpu")
    planned = plan_recipe(loaded, device, loaded.cluster.ranks, Constants())["pretrain"]
    assert planned.own is not None
    if recipe != QUICKSTART:
        assert planned.parameters == PARAMETERS[recipe.stem]


def test_the_quickstart_takes_as_long_as_predicted() -> None:
    """docs/performance.md: a product peak of 75 GFLOP/s, 200 steps in 227 s with checkpoints."""
    cpu = measured_cpu(size=32, repeats=1)
    known = {"plain_peak": 75e9, "memory_bandwidth": 20e9, "link_bandwidth": 20e9}
    cpu = replace(cpu, peaks={"fp32": 75e9}, processors=2, **known)
    loaded = load_recipe(QUICKSTART)
    planned = plan_recipe(loaded, cpu, 8, Constants())["pretrain"]
    assert planned.own is not None
    assert 1 / 1.5 < planned.own.step.total / (227 / 200) < 1.5


def test_a_thousand_gpus_are_searched_in_three_seconds() -> None:
    assert processor_seconds(GPT3) < 3.0


def test_help_is_there_in_half_a_second() -> None:
    assert processor_seconds("--help") < 0.5


def test_the_answer_is_one_object_with_the_recipes_layout_and_better_ones() -> None:
    planned = answer(GPT3, "--why", "--price", 2)["stages"]["pretrain"]
    own, best = planned["own"], planned["best"][0]
    assert own["layout"]["tensor"] == 8 and own["layout"]["pipeline"] == 16
    assert best["step_seconds"]["total"] < own["step_seconds"]["total"]
    parts = dict(own["step_seconds"])
    assert parts.pop("total") == pytest.approx(sum(parts.values()))
    sizes = dict(own["memory_gib"])
    total, headroom = sizes.pop("total"), sizes.pop("headroom")
    assert total == pytest.approx(sum(sizes.values()), abs=0.01)
    assert total + headroom == pytest.approx(79.3, abs=0.01)
    assert own["cost"] == pytest.approx(2 * own["gpu_hours"])
    assert own["gpu_hours"] == pytest.approx(1024 * 24 * own["days"])
    assert 0.2 < own["mfu"] < own["hfu"] < 0.8
    assert {"step: compute", "memory: weights", "MFU"} <= {w["number"] for w in planned["why"]}
    assert all(reason["source"] for reason in planned["why"])
    assert planned["impossible"]


def test_the_table_is_for_people() -> None:
    done = plan(LLAMA3, "--gpu", "gb200", "--why")
    assert done.returncode == 0, done.stderr
    for word in ("recipe", "best 1", "activations", "bubble", "MFU", "Korthikanti"):
        assert word in done.stdout


def test_the_best_layout_is_written_as_a_recipe_that_plans_alike(tmp_path: Path) -> None:
    file = tmp_path / "best.yaml"
    found = answer(LLAMA3, "--gpus", 32, "--write", file)["stages"]["pretrain"]["best"]
    written = load_recipe(file)
    assert written.cluster.nodes == 4
    own = answer(file, "--gpu", "h100")["stages"]["pretrain"]["own"]
    chosen = next(each for each in found if each["fits"] == "fits")
    assert own["layout"] == chosen["layout"]
    assert own["step_seconds"] == chosen["step_seconds"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([LLAMA3, "--gpu", "tpu"], "--gpu 'tpu': is not known"),
        ([], "needs RECIPE, or --validate TABLE.csv"),
        ([LLAMA3, "--calibration", "none-such"], "make it by --calibrate"),
        ([LLAMA3, "cluster.nodes=3"], "does not divide"),
        (["--validate", LLAMA3], "no table of results"),
        ([LLAMA3, "--calibrate", LLAMA3], "holds no step_seconds"),
    ],
)
def test_a_wrong_call_is_one_line(arguments: list, line: str) -> None:
    done = plan(*arguments)
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_layout_that_cannot_run_on_so_many_gpus_is_told_beside_those_that_can() -> None:
    planned = answer(LLAMA3, "--gpus", 12)["stages"]["pretrain"]
    assert planned["own"] is None
    assert "8 ranks hold a model and do not divide 12 GPUs" in planned["why_not"]


def test_a_measured_run_draws_the_constants_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "step_seconds": 10.5}) for step in range(1, 50)]
    metrics.write_text("\n".join(["{", *lines]) + "\n")
    monkeypatch.setattr(calibration, "FOLDER", tmp_path / "kept")
    told = answer(LLAMA3, "--calibrate", metrics, "--calibration", "ours")
    before, now = told["predicted_before"], told["predicted_now"]
    assert abs(now - 10.5) < 0.6 * abs(before - 10.5)
    own = answer(LLAMA3, "--calibration", "ours")["stages"]["pretrain"]["own"]
    assert own["step_seconds"]["total"] == pytest.approx(now)
    other = answer(LLAMA3)["stages"]["pretrain"]["own"]
    assert other["step_seconds"]["total"] == pytest.approx(before)


def test_run_warns_of_a_layout_that_does_not_fit() -> None:
    cramped = [
        "stages.pretrain.parallel={tensor: 1, pipeline: 1}",
        "stages.pretrain.recompute=none",
    ]
    assert memory_warnings(load_recipe(LLAMA3)) == []
    (line,) = memory_warnings(load_recipe(LLAMA3, cramped))
    assert line.startswith("warning: stages.pretrain: its layout needs about ")
    partition = [*cramped, "cluster.slurm={partition: gb300}"]
    assert memory_warnings(load_recipe(LLAMA3, partition)) == []
    done = llmscale("run", LLAMA3, *cramped, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert line in done.stderr
