"""The engine's own promises: skipped steps, whose error it is, reaching the last step."""

from pathlib import Path

import pytest

from llmscale.errors import StageError
from tests.conftest import QUICKSTART
from tests.ranks import run_ranks, run_recipe
from tests.small import at
from tests.training import programs
from tests.training.test_recovery import SMALL


@pytest.mark.ranks
def test_a_loss_that_is_no_number_on_one_rank_skips_the_step_on_all(tmp_path: Path) -> None:
    seen = run_ranks(programs.nonfinite_step, 2, tmp_path)
    assert seen == {"applied": [True, False, True], "unchanged": True, "changed": True}


@pytest.mark.ranks
def test_nonfinite_steps_in_a_row_stop_the_run_and_name_their_samples(run_folder: Path) -> None:
    wild = [
        "stages.pretrain.optimizer={learning_rate: 1.0e+30, warmup_steps: 0}",
        "stages.pretrain.health.nonfinite_steps=3",
    ]
    with pytest.raises(StageError, match=r"3 steps in a row were not finite.*samples are \d+, "):
        run_recipe(QUICKSTART, run_folder, [*SMALL, *at(1, 1, 1), *wild], ["pretrain"])


@pytest.mark.ranks
@pytest.mark.parametrize("failing", [0, 3])
def test_a_dead_ranks_own_error_is_told_not_the_others_lost_connections(
    failing: int, tmp_path: Path
) -> None:
    with pytest.raises(StageError) as raised:
        run_ranks(programs.fail_alone, 4, tmp_path, failing=failing)
    assert f"rank {failing} failed: the disk of this rank is on fire" in str(raised.value)
    assert f"rank-{failing:05d}.log" in str(raised.value)


@pytest.mark.ranks
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_lowers_the_loss(precision: str, run_folder: Path) -> None:
    from tests.training.test_layouts import curve

    more = [
        f"stages.pretrain.precision={precision}",
        "stages.pretrain.optimizer.warmup_steps=5",
        "stages.pretrain.steps=30",
        "stages.pretrain.checkpoint.every=30",
    ]
    run_recipe(QUICKSTART, run_folder, [*SMALL, *at(2, 1, 1), *more], ["pretrain"])
    losses = curve(run_folder / "pretrain", "loss")
    assert losses[-1] < losses[0] - 0.5
