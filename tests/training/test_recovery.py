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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from llmscale.artifacts import RunFolder, StageFolder
from llmscale.errors import StageError
from tests.conftest import QUICKSTART
from tests.ranks import cut_off_after, run_recipe
from tests.small import SMALL_MODEL, at
from tests.training.test_layouts import curve, parameters

STEPS = 24
SMALL = [
    *SMALL_MODEL,
    f"stages.pretrain.steps={STEPS}",
    "stages.pretrain.batch={global: 8, micro: 2}",
    "stages.pretrain.checkpoint={every: 4, keep: 2}",
]
KEEP_ALL = "stages.pretrain.checkpoint.keep=6"
ASYNCHRONOUS = "stages.pretrain.checkpoint.asynchronous=true"


@pytest.fixture(scope="module")
def uninterrupted(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    shutil.copytree(prepared, folder)
    run_recipe(QUICKSTART, folder, [*SMALL, *at(2, 2, 2), KEEP_ALL], ["pretrain"])
    return folder / "pretrain"


@pytest.fixture
def cut_off(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of that run as a kill before step 24's checkpoint leaves it."""
    folder = Path(shutil.copytree(uninterrupted.parent, tmp_path / "cut-off"))
    cut_off_after(RunFolder(folder).stage("pretrain"), 20)
    return folder


def rank_processes(stage: Path) -> list[int]:
    """The process ids of the training ranks that started last, from their logs."""
    found = []
    for log in sorted((stage / "logs").glob("rank-*.log")):
        starts = re.findall(r"train: rank \d+ of \d+, process (\d+)", log.read_text())
        if starts:
            found.append(int(starts[-1]))
    return found


def steps_logged(stage: Path) -> int:
    return len(curve(stage, "loss")) if (stage / "metrics.jsonl").exists() else 0


def being_saved(stage: Path) -> bool:
    return any(stage.glob("checkpoints/.*.partial"))


Moment = Callable[[Path], bool]
KILLS: dict[str, tuple[Moment, list[str]]] = {
    "before the first step": (lambda stage: True, []),
    "between steps, past a checkpoint": (lambda stage: steps_logged(stage) >= 6, []),
    "while a checkpoint is written": (being_saved, []),
    "while one is written beside the next steps": (being_saved, [ASYNCHRONOUS]),
    "at any time": (lambda stage: random.random() < 0.01, []),
    "at any time, writing beside the steps": (lambda stage: random.random() < 0.01, [ASYNCHRONOUS]),
    "while the model is exported": (lambda stage: (stage / ".hf.partial").exists(), []),
}


class Killer(threading.Thread):
    """Kills one random rank at a moment after training began to move."""

    def __init__(self, stage: Path, moment: Moment) -> None:
        super().__init__(daemon=True)
        self.stage, self.moment, self.killed = stage, moment, False
        self.before = set(rank_processes(stage)) if stage.exists() else set()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            fresh = [pid for pid in rank_processes(self.stage) if pid not in self.before]
            if len(fresh) == 8:
                break
        while not self.over.wait(0.005):
            if self.moment(self.stage):
                with suppress(ProcessLookupError):
                    os.kill(random.choice(fresh), signal.SIGKILL)
                    self.killed = True
                return


@pytest.mark.ranks
@pytest.mark.slow
def test_kills_at_any_moment_leave_the_loss_curve_bit_for_bit(
    run_folder: Path, uninterrupted: Path
) -> None:
    random.seed(0)
    stage = run_folder / "pretrain"
    recipe = [*SMALL, *at(2, 2, 2)]
    for name, (moment, more) in KILLS.items():
        killed = False
        while not killed:
            if (
                stage.exists()
                and RunFolder(run_folder).stage("pretrain").manifest()["status"] == "finished"
            ):
                shutil.rmtree(stage)
            killer = Killer(stage, moment)
            killer.start()
            try:
                run_recipe(QUICKSTART, run_folder, [*recipe, *more], ["pretrain"])
            except StageError as error:
                assert "SIGKILL" in str(error), name
            killer.over.set()
            killer.join()
            killed = killer.killed
    run_recipe(QUICKSTART, run_folder, recipe, ["pretrain"])
    assert curve(stage, "loss") == curve(uninterrupted, "loss")
    assert curve(stage, "validation_loss") == curve(uninterrupted, "validation_loss")
    assert curve(stage, "gradient_norm") == curve(uninterrupted, "gradient_norm")
    ours, expected = parameters(stage), parameters(uninterrupted)
    assert all(ours[name].equal(expected[name]) for name in expected)


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


@pytest.mark.ranks
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1)])
def test_a_checkpoint_of_eight_ranks_goes_on_at_another_layout(
    layout: tuple[int, int, int], cut_off: Path, uninterrupted: Path
) -> None:
    run_recipe(QUICKSTART, cut_off, [*SMALL, *at(*layout)], ["pretrain"])
    assert not (cut_off / "superseded").exists()
    assert curve(cut_off / "pretrain", "loss") == pytest.approx(
        curve(uninterrupted, "loss"), rel=1e-5
    )


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.ranks
def test_damaged_checkpoints_are_named_and_the_one_before_is_used(
    cut_off: Path, uninterrupted: Path
) -> None:
    stage = cut_off / "pretrain"
    newest = sorted((stage / "checkpoints").glob("step-*"), reverse=True)
    victims = [
        max(path.glob("*.distcp"), key=lambda file: file.stat().st_size) for path in newest[:3]
    ]
    for damage, victim in zip((flip_a_byte, cut_short, Path.unlink), victims, strict=True):
        damage(victim)
    (newest[3] / "COMPLETE").unlink()
    run_recipe(QUICKSTART, cut_off, [*SMALL, *at(2, 1, 1)], ["pretrain"])
    named = [
        line
        for line in (stage / "logs" / "rank-00000.log").read_text().splitlines()
        if "using the one before" in line
    ]
    for line, checkpoint, victim in zip(named, newest[:4], [*victims, None], strict=True):
        assert checkpoint.name in line
        assert victim is None or victim.name in line
    assert curve(stage, "loss") == pytest.approx(curve(uninterrupted, "loss"), rel=1e-5)
    assert curve(stage, "validation_loss") == pytest.approx(
        curve(uninterrupted, "validation_loss"), rel=1e-5
    )


@pytest.mark.ranks
def test_an_asynchronous_save_gives_the_same_run(run_folder: Path, uninterrupted: Path) -> None:
    run_recipe(QUICKSTART, run_folder, [*SMALL, *at(2, 2, 2), ASYNCHRONOUS], ["pretrain"])
    stage = RunFolder(run_folder).stage("pretrain")
    assert curve(stage.path, "loss") == curve(uninterrupted, "loss")
    check_older_checkpoints_are_pruned(stage)


def check_older_checkpoints_are_pruned(stage: StageFolder) -> None:
    """Two stay, as ``keep`` has it, and the best."""
    complete = {path.parent.name for path in stage.checkpoints.glob("step-*/COMPLETE")}
    steps = {int(name.removeprefix("step-")) for name in complete}
    assert steps == {STEPS - 4, STEPS, stage.manifest()["metrics"]["best_step"]}


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
    check_older_checkpoints_are_pruned(RunFolder(run_folder).stage("pretrain"))
