"""A sweep runs what its members have in common once, and each member as a run of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmscale import runs
from llmscale.artifacts import RunFolder
from llmscale.clusters.base import ClusterSettings, Job, Task
from llmscale.clusters.slurm import commands
from llmscale.clusters.slurm.script import MEMBER, BatchJob
from llmscale.errors import RecipeError
from llmscale.launch import Request
from llmscale.recipe.recipe import load_recipe
from llmscale.sweeps import Sweep
from tests.called import llmscale
from tests.conftest import QUICKSTART
from tests.small import at
from tests.training.test_recovery import SMALL

RATE = "stages.pretrain.optimizer.learning_rate"
TINY = [
    *SMALL,
    *at(1, 1, 1),
    "stages.pretrain.steps=4",
    "stages.pretrain.optimizer.warmup_steps=2",
]
TRAINING = ["--stages", "corpus,tokenizer,pretrain"]
EVERY_STAGE = ["corpus", "tokenizer", "pretrain", "evaluation", "quantized", "schemes"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def sweep_of(folder: Path, sweep: str, *overrides: str, stages: Any = None) -> Sweep:
    recipe = load_recipe(QUICKSTART, [*TINY, f"sweep={sweep}", *overrides])
    return Sweep.of(Request(recipe, RunFolder(folder), stages))


@pytest.mark.parametrize(
    ("sweep", "common"),
    [
        (f"{{{RATE}: [1e-3, 3e-3]}}", ["corpus", "tokenizer"]),
        ("{stages.tokenizer.vocabulary_size: [300, 400]}", ["corpus"]),
        (
            "{stages.evaluation.samples.temperature: [1, 2]}",
            ["corpus", "tokenizer", "pretrain", "quantized", "schemes"],
        ),
        ("{seed: [1, 2]}", []),
        ("{stages.pretrain.recompute: [none, full]}", ["corpus", "tokenizer"]),
        ("{seed: [1234]}", EVERY_STAGE),
        ("{seed: [7]}", []),
    ],
)
def test_common_are_the_stages_that_no_value_of_the_sweep_changes(
    folder: Path, sweep: str, common: list[str]
) -> None:
    found = sweep_of(folder, sweep)
    assert list(found.common_stages) == common
    own = [name for name in EVERY_STAGE if name not in common]
    assert [list(member.request.stages or ()) for member in found.members] == [own] * len(
        found.members
    )


def test_a_member_links_to_common_stages_and_a_changed_sweep_keeps_what_was_its_own(
    folder: Path,
) -> None:
    sweep_of(folder, f"{{{RATE}: [1e-3, 3e-3]}}").lay_out()
    first, second = (RunFolder(folder).member(number) for number in ("000", "001"))
    links = [(member.path / "tokenizer").readlink() for member in (first, second)]
    assert links == [Path("../../tokenizer")] * 2
    assert load_recipe(second.recipe_file).sweep is None
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "common").touch()

    sweep_of(folder, "{stages.tokenizer.vocabulary_size: [300, 400]}").lay_out()
    assert not (first.path / "tokenizer").is_symlink()
    (first.path / "tokenizer").mkdir()
    (first.path / "tokenizer" / "own").touch()

    sweep_of(folder, f"{{{RATE}: [1e-3, 3e-3]}}").lay_out()
    assert (first.path / "tokenizer" / "common").exists()
    assert (first.path / "superseded" / "tokenizer-1" / "own").exists()


def test_a_member_never_writes_into_a_stage_that_is_common(folder: Path) -> None:
    sweep = sweep_of(folder, f"{{{RATE}: [1e-3, 3e-3]}}")
    sweep.lay_out()
    member = sweep.members[0].request
    with pytest.raises(RecipeError, match=r"in common, and it is not finished; run the sweep$"):
        member.pipeline().run(["corpus"])
    assert not (folder / "corpus").exists()


def finish(request: Request) -> None:
    for plan in request.pipeline().plans(request.stages):
        request.folder.stage(plan.name).update_manifest(
            status="finished", fingerprint=plan.fingerprint
        )


def test_jobs_are_the_common_tasks_and_one_array_of_the_unfinished_members(folder: Path) -> None:
    sweep = sweep_of(
        folder,
        f"{{{RATE}: [1e-3, 2e-3, 3e-3, 4e-3]}}",
        "cluster={on: slurm, nodes: 2, ranks_per_node: 2}",
        "stages.pretrain.parallel={data: 4}",
    )
    sweep.lay_out()
    *chained, array = sweep.jobs(None)
    assert [job.needs.stage for job in chained] == ["corpus", "tokenizer"]
    assert (array.array, array.needs.task.nodes, array.needs.task.ranks) == ("0-3", 2, 4)
    finish(sweep.common)
    for number in (0, 2):
        finish(sweep.members[number].request)
    assert [job.array for job in sweep.jobs(None)] == ["1,3"]
    for member in sweep.members:
        finish(member.request)
    assert sweep.jobs(None) == []


def test_an_arrays_script_replaces_the_members_number_and_nothing_else(tmp_path: Path) -> None:
    wild = """a 'b' "c" $HOME `id` $(id) *"""
    job = BatchJob(
        "name",
        Job(tmp_path, "sweep", Task("train")),
        ("printf", r"%s\n", wild, f"/{wild}/{MEMBER}/recipe.yaml", f"--run-dir={MEMBER}", ""),
        array="0-9",
    )
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "8"}
    script = job.script(ClusterSettings())
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, env=environment)
    assert done.stdout.split("\n")[:-1] == [wild, f"/{wild}/008/recipe.yaml", "--run-dir=008", ""]
    assert "#SBATCH --array=0-9\n" in script


def test_members_of_an_array_are_known_asked_for_together_or_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = "8_1|8|PENDING|None|\n8_0|9|RUNNING|None|node1\n7|7|COMPLETED|None|node2\n"
    monkeypatch.setattr(commands, "_ask", lambda _command: listed)
    assert list(commands.job_states(["7", "8"])) == ["7", "8_1", "8_0"]
    assert list(commands.job_states(["8_0", "8_1", "7"])) == ["8_0", "8_1", "7"]


def told(run: Path) -> dict[str, Any]:
    done = llmscale("status", run, "--json")
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_a_dry_run_names_every_member_and_writes_nothing(folder: Path) -> None:
    call = ["run", QUICKSTART, *TINY, f"sweep.{RATE}=[1e-3, 3e-3]", "--run-dir", folder]
    answer = json.loads(llmscale(*call, "--dry-run", "--json").stdout)
    assert [task["stage"] for task in answer["tasks"]] == ["corpus", "tokenizer"]
    assert [member["values"][RATE] for member in answer["sweep"]] == [0.001, 0.003]
    text = llmscale(*call, "--dry-run", "--on", "slurm").stdout
    assert text.count("#SBATCH --array=0-1") == 1
    wrong = llmscale(*call, "--stages", "pretrain")
    assert wrong.returncode == 2
    assert wrong.stderr == "--stages: pretrain needs corpus, which is not finished; add it\n"
    assert not folder.exists()


@pytest.mark.ranks
@pytest.mark.slow
def test_members_run_in_order_a_failing_one_stops_no_other_and_running_again_goes_on(
    run_folder: Path,
) -> None:
    call = ["run", QUICKSTART, *TINY, f"sweep.{RATE}=[1e-3, 1e+30, 3e-3]", *TRAINING]
    call += ["stages.pretrain.health.nonfinite_steps=1", "--run-dir", run_folder]
    first = llmscale(*call, "--json")
    assert first.returncode == 4
    answer = json.loads(first.stdout)
    assert answer["error"].startswith("member 001 failed; 001: pretrain (train): rank 0 failed")
    assert first.stderr.count("not finite") >= 1

    status = told(run_folder)
    assert [(stage["stage"], stage["status"]) for stage in status["stages"]] == [
        ("corpus", "finished"),
        ("tokenizer", "finished"),
    ]
    rows = status["sweep"]
    assert rows == answer["sweep"]
    assert [row["member"] for row in rows] == ["000", "001", "002"]
    assert [row["values"] for row in rows] == [{RATE: 1e-3}, {RATE: 1e30}, {RATE: 3e-3}]
    # the evaluation was not asked for
    assert [row["status"] for row in rows] == ["waiting", "failed", "waiting"]
    losses = [row["metrics"].get("validation_loss") for row in rows]
    assert losses[1] is None
    assert losses[0] != losses[2]
    assert str(runs.model_folder(f"{run_folder}/sweep/002:pretrain")).endswith("002/pretrain/hf")
    table = llmscale("status", run_folder).stdout
    assert "member  learning_rate  status   validation_loss" in table
    assert f"{losses[2]:.4f}" in table
    assert llmscale("logs", f"{run_folder}/sweep/001").stdout

    again = llmscale(*call)
    assert again.returncode == 4
    assert again.stderr.startswith("member 001 failed; ")
    assert again.stdout.count(": finished before") == 4
    mended = [argument for argument in call if "1e+30" not in str(argument)]
    mended.insert(2, f"sweep.{RATE}=[1e-3, 2e-3, 3e-3]")
    assert llmscale(*mended).returncode == 0


def until(true: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


@pytest.mark.ranks
@pytest.mark.slow
def test_ctrl_c_stops_all_members_and_the_folder_is_held_meanwhile(run_folder: Path) -> None:
    call = [QUICKSTART, *TINY, "stages.pretrain.steps=100000", f"sweep.{RATE}=[1e-3, 3e-3]"]
    command = [sys.executable, "-m", "llmscale", "run", *map(str, [*call, "--run-dir", run_folder])]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        metrics = run_folder / "sweep" / "000" / "pretrain" / "metrics.jsonl"
        until(lambda: metrics.exists() and metrics.stat().st_size > 0)
        running = told(run_folder)
        assert running["running"].startswith(f"process {process.pid} ")
        assert [row["status"] for row in running["sweep"]] == ["running", "waiting"]
        assert llmscale("run", *call, "--run-dir", run_folder).returncode == 2
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "run the same command again" in errors
    assert [row["status"] for row in told(run_folder)["sweep"]] == ["interrupted", "waiting"]
