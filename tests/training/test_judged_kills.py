"""Killed in the middle, reward and preference training go on to the same numbers."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmscale.artifacts import RunFolder
from llmscale.errors import StageError
from tests.ranks import kill_a_rank_after, run_recipe
from tests.training import test_dpo, test_reward
from tests.training.judged import LAYOUTS, about, judged_home, logged

LONGER = ["stages.judged.steps=12", "stages.judged.checkpoint.every=3"]
STAGES = {"reward": test_reward.STAGE, "dpo": test_dpo.STAGE}


@pytest.mark.ranks
@pytest.mark.parametrize(("kind", "layout"), [("reward", "tensor 2"), ("dpo", "ZeRO 3")])
def test_a_killed_stage_goes_on_to_the_same_curve_bit_for_bit(
    kind: str, layout: str, tmp_path: Path
) -> None:
    home = judged_home(tmp_path, STAGES[kind])
    overrides = [*LAYOUTS[layout], *LONGER]
    whole = run_recipe(home / "recipe.yaml", tmp_path / "whole", overrides)
    stage = RunFolder(tmp_path / "killed").stage("judged")
    killer = threading.Thread(target=kill_a_rank_after, args=(stage, 7), daemon=True)
    killer.start()
    with pytest.raises(StageError, match="SIGKILL"):
        run_recipe(home / "recipe.yaml", tmp_path / "killed", overrides)
    killer.join()
    resumed = run_recipe(home / "recipe.yaml", tmp_path / "killed", overrides)
    assert logged(resumed) == logged(whole)
    ours, expected = weights(resumed), weights(whole)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    if kind == "reward":
        assert about(resumed, "scores.json") == about(whole, "scores.json")


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.stage("judged").hf / "model.safetensors")
