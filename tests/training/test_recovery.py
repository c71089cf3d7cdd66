"""One recovery path: run again and it goes on, exactly where it was, whatever ended it."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from llmscale.artifacts import RunFolder
from llmscale.errors import StageError
from tests.conftest import QUICKSTART
from tests.ranks import run_recipe
from tests.small import SMALL_MODEL, at
from tests.training.test_layouts import curve, parameters

STEPS = 60
SMALL = [
    *SMALL_MODEL,
    f"stages.pretrain.steps={STEPS}",
    "stages.pretrain.batch={global: 8, micro: 2}",
    "stages.pretrain.checkpoint={every: 4, keep: 2}",
]


@pytest.fixture(scope="module")
def uninterrupted(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    shutil.copytree(prepared, folder)
    run_recipe(QUICKSTART, folder, [*SMALL, *at(2, 2, 2)], ["pretrain"])
    return folder / "pretrain"


def rank_processes(stage: Path) -> list[int]:
    """The process ids of the training ranks that started last, from their logs."""
    found = []
    for log in sorted((stage / "logs").glob("rank-*.log")):
        starts = re.findall(r"train: rank \d+ of \d+, process (\d+)", log.read_text())
        if starts:
            found.append(int(starts[-1]))
    return found


class Killer(threading.Thread):
    """Kills one random rank, some random time after training began to move."""

    def __init__(self, stage: Path, chance: random.Random) -> None:
        super().__init__(daemon=True)
        self.stage, self.chance, self.killed = stage, chance, False
        self.before = set(rank_processes(stage)) if stage.exists() else set()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            fresh = [pid for pid in rank_processes(self.stage) if pid not in self.before]
            if len(fresh) == 8:
                break
        else:
            return
        if self.over.wait(self.chance.uniform(0.0, 4.0)):
            return
        try:
            os.kill(self.chance.choice(fresh), signal.SIGKILL)
            self.killed = True
        except ProcessLookupError:
            pass


@pytest.mark.ranks
@pytest.mark.slow
def test_twenty_kills_leave_the_loss_curve_bit_for_bit(
    run_folder: Path, uninterrupted: Path
) -> None:
    chance = random.Random(0)
    stage = run_folder / "pretrain"
    recipe = [*SMALL, *at(2, 2, 2)]
    kills = during_save = 0
    while kills < 20:
        if (
            stage.exists()
            and RunFolder(run_folder).stage("pretrain").manifest()["status"] == "finished"
        ):
            shutil.rmtree(stage)
        killer = Killer(stage, chance)
        killer.start()
        try:
            run_recipe(QUICKSTART, run_folder, recipe, ["pretrain"])
        except StageError as error:
            assert "SIGKILL" in str(error)
        killer.over.set()
        killer.join()
        kills += killer.killed
        during_save += any(stage.glob("checkpoints/.*.partial"))
    run_recipe(QUICKSTART, run_folder, recipe, ["pretrain"])
    assert curve(stage, "loss") == curve(uninterrupted, "loss")
    assert curve(stage, "validation_loss") == curve(uninterrupted, "validation_loss")
    assert curve(stage, "gradient_norm") == curve(uninterrupted, "gradient_norm")
    ours, expected = parameters(stage), parameters(uninterrupted)
    assert all(ours[name].equal(expected[name]) for name in expected)
    print(f"{kills} kills, {during_save} of them during a save")


def alive(process: int) -> bool:
    """Whether a process runs; one that ended may wait for its parent's notice as a zombie."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.ranks
def test_the_ranks_end_with_their_launcher(run_folder: Path) -> None:
    stage = run_folder / "pretrain"
    command = [sys.executable, "-m", "llmscale", "run", str(QUICKSTART), "--run-dir"]
    command += [str(run_folder), "--stages", "pretrain", *SMALL, *at(2, 1, 1)]
    command += ["stages.pretrain.steps=100000"]
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (stage / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = rank_processes(stage)
    assert len(ranks) == 2
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 10
    while any(alive(rank) for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(rank) for rank in ranks)


def train_half(run_folder: Path, layout: list[str]) -> Path:
    """Trains until a checkpoint after step 20, then is killed."""
    stage = run_folder / "pretrain"
    over = threading.Event()

    def kill_after_step_20() -> None:
        while not over.wait(0.05):
            if (stage / "checkpoints" / "step-00000020" / "COMPLETE").exists():
                for pid in rank_processes(stage):
                    os.kill(pid, signal.SIGKILL)
                return

    thread = threading.Thread(target=kill_after_step_20, daemon=True)
    thread.start()
    with pytest.raises(StageError):
        run_recipe(QUICKSTART, run_folder, [*SMALL, *layout], ["pretrain"])
    over.set()
    thread.join()
    return stage


@pytest.mark.ranks
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1)])
def test_a_checkpoint_of_eight_ranks_goes_on_at_another_layout(
    layout: tuple[int, int, int], run_folder: Path, uninterrupted: Path
) -> None:
    stage = train_half(run_folder, at(2, 2, 2))
    run_recipe(QUICKSTART, run_folder, [*SMALL, *at(*layout)], ["pretrain"])
    assert not (run_folder / "superseded").exists()
    assert curve(stage, "loss") == pytest.approx(curve(uninterrupted, "loss"), rel=1e-5)


@pytest.mark.ranks
@pytest.mark.parametrize("damage", ["flip a byte", "cut short", "remove a file", "no COMPLETE"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: str, run_folder: Path, uninterrupted: Path
) -> None:
    stage = train_half(run_folder, at(2, 1, 1))
    newest = sorted((stage / "checkpoints").glob("step-*"), reverse=True)[0]
    victim = max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size)
    if damage == "flip a byte":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "cut short":
        os.truncate(victim, victim.stat().st_size - 1)
    elif damage == "remove a file":
        victim.unlink()
    else:
        (newest / "COMPLETE").unlink()
    run_recipe(QUICKSTART, run_folder, [*SMALL, *at(2, 1, 1)], ["pretrain"])
    named = [
        line
        for line in (stage / "logs" / "rank-00000.log").read_text().splitlines()
        if "using the one before" in line
    ]
    assert len(named) == 1
    assert newest.name in named[0]
    if damage in ("flip a byte", "cut short", "remove a file"):
        assert victim.name in named[0]
    assert curve(stage, "loss") == pytest.approx(curve(uninterrupted, "loss"), rel=1e-5)


@pytest.mark.ranks
def test_checkpoints_older_than_keep_are_pruned_but_the_best_stays(uninterrupted: Path) -> None:
    steps = {int(path.name[5:]) for path in (uninterrupted / "checkpoints").glob("step-*")}
    best = RunFolder(uninterrupted.parent).stage("pretrain").manifest()["metrics"]["best_step"]
    assert steps == {STEPS - 4, STEPS, best}


@pytest.mark.ranks
def test_an_asynchronous_save_gives_the_same_run(run_folder: Path, uninterrupted: Path) -> None:
    more = ["stages.pretrain.checkpoint.asynchronous=true"]
    run_recipe(QUICKSTART, run_folder, [*SMALL, *at(2, 2, 2), *more], ["pretrain"])
    assert curve(run_folder / "pretrain", "loss") == curve(uninterrupted, "loss")
    assert (run_folder / "pretrain" / "checkpoints" / f"step-{STEPS:08d}" / "COMPLETE").exists()


@pytest.mark.ranks
def test_a_stop_signal_saves_at_the_steps_end_and_running_again_goes_on(
    run_folder: Path, uninterrupted: Path
) -> None:
    from llmscale.errors import Interrupted

    stage = run_folder / "pretrain"

    def stop_one_rank_after_a_step() -> None:
        while not (stage / "metrics.jsonl").exists() or len(curve(stage, "loss")) < 3:
            time.sleep(0.02)
        os.kill(rank_processes(stage)[1], signal.SIGUSR1)

    thread = threading.Thread(target=stop_one_rank_after_a_step, daemon=True)
    thread.start()
    with pytest.raises(Interrupted):
        run_recipe(QUICKSTART, run_folder, [*SMALL, *at(2, 1, 1)], ["pretrain"])
    thread.join()
    assert RunFolder(run_folder).stage("pretrain").manifest()["status"] == "interrupted"
    done = len(curve(stage, "loss"))
    assert (stage / "checkpoints" / f"step-{done:08d}" / "COMPLETE").exists()
    run_recipe(QUICKSTART, run_folder, [*SMALL, *at(2, 1, 1)], ["pretrain"])
    assert curve(stage, "loss") == pytest.approx(curve(uninterrupted, "loss"), rel=1e-5)
