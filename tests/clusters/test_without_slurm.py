"""Where SLURM is not, a run on it says so at once."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import QUICKSTART


def test_a_machine_without_slurm_is_told_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmscale", "run", str(QUICKSTART), "--on", "slurm"]
    begun = time.monotonic()
    told = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": str(tmp_path)},
    )
    assert time.monotonic() - begun < 5, "a second on an idle machine"
    assert told.returncode == 3
    assert told.stderr == (
        "cluster.on: slurm needs sbatch, which is not on PATH; run on a login node of the "
        "cluster, or use --on local\n"
    )
    assert not (tmp_path / "run").exists()
