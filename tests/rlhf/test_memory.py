"""Long runs of learning from rewards need no more memory than short ones."""

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.rlhf.letters import letters_home
from tests.rlhf.programs import learn_while_weighed

MEBIBYTE = 2**20


@pytest.mark.ranks
@pytest.mark.slow
def test_memory_stays_flat_over_two_hundred_iterations(tmp_path: Path) -> None:
    home = letters_home(
        tmp_path / "home",
        steps=200,
        rollout={"prompts": 16, "max_new_tokens": 8},
        batch={"global": 16, "micro": 8},
        update={"passes": 2},
        checkpoint={"every": 20, "asynchronous": True},
        samples_every=10,
    )
    recipe = str(home / "recipe.yaml")
    weights = run_ranks(learn_while_weighed, 1, tmp_path / "run", recipe=recipe)
    assert len(weights) == 200
    early, late = max(weights[40:80]), max(weights[160:])
    told = ", ".join(f"{weight / MEBIBYTE:.1f}" for weight in weights[::20])
    assert late - early < 4 * MEBIBYTE, f"MiB every 20 iterations: {told}"
