"""A Ray cluster within a SLURM job."""

from pathlib import Path

import pytest

from tests.cluster.runs import SMALL, STEPS, TWO_NODES, UP_TO_TRAINING, Curve, curve
from tests.cluster.slurm.cluster import Cluster
from tests.cluster.slurm.runs import completed, sbatch

pytestmark = [pytest.mark.slurm, pytest.mark.ray, pytest.mark.slow]


def test_a_recipe_on_ray_within_a_job_trains_as_local_ranks_do(
    slurm: Cluster, run: Path, local_curve: Curve
) -> None:
    spread = "cluster.ray={placement: strict_spread}"
    job = sbatch(slurm, run, *TWO_NODES, *SMALL, spread, *UP_TO_TRAINING, script="slurm/ray.sbatch")
    completed(slurm, job, run)
    assert curve(run) == local_curve
    assert len(local_curve) == STEPS
