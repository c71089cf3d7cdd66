"""Learning from rewards on a real Ray cluster: killed actors change nothing."""

from pathlib import Path

import pytest

from llmscale.artifacts import RunFolder
from tests.cluster.ray.cluster import Cluster
from tests.cluster.ray.runs import actor_of, submit, succeeded
from tests.cluster.runs import mishaps, rank_process, until
from tests.ranks import run_recipe
from tests.rlhf.letters import letters_home
from tests.rlhf.test_ppo import iterations

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ON_TWO_WORKERS = [
    "cluster.nodes=2",
    "cluster.ranks_per_node=1",
    "cluster.ray={placement: strict_spread}",
]


def test_actors_of_any_role_may_be_killed_on_nodes_of_their_own(
    cluster: Cluster, tmp_path: Path
) -> None:
    home = letters_home(
        tmp_path / "home",
        2,
        parallel={"data": 1},
        placement="separate",
        steps=24,
        checkpoint={"every": 3},
        kl={"coefficient": 0.1, "target": 0.05, "horizon": 200},
        rollout={"prompts": 24, "max_new_tokens": 6},
        batch={"global": 12, "micro": 6},
    )
    recipe, run = home / "recipe.yaml", tmp_path / "run"
    whole = run_recipe(recipe, tmp_path / "whole", [])
    job = submit(cluster, run, *ON_TWO_WORKERS, recipe=recipe)
    for rank, moment in enumerate((5, 14)):
        until(lambda: done(run) > moment)  # noqa: B023
        actor_of(rank_process(run, rank)).kill()
        until(lambda: mishaps(run) > rank)  # noqa: B023
    succeeded(cluster, job)
    assert iterations(RunFolder(run)) == iterations(whole)
    ours, expected = (each / "ppo" / "hf" / "model.safetensors" for each in (run, whole.path))
    assert ours.read_bytes() == expected.read_bytes()


def done(run: Path) -> int:
    """How many iterations are logged so far."""
    stage = RunFolder(run).stage("ppo")
    return len(iterations(RunFolder(run))) if stage.metrics_file.exists() else 0
