"""A sweep on a real SLURM cluster: one array of jobs, each member a run that goes on by itself."""

import json
from pathlib import Path

import pytest

from tests.cluster.runs import SMALL, steps, until
from tests.cluster.slurm.cluster import Cluster
from tests.cluster.slurm.runs import ENDED, completed, llmscale, sbatch, status
from tests.conftest import QUICKSTART
from tests.small import at

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

RATE = "stages.pretrain.optimizer.learning_rate"
STEPS = "stages.pretrain.steps"
TINY = [*SMALL, *at(1, 1, 1), f"{STEPS}=4", "stages.pretrain.optimizer.warmup_steps=2"]


FEW_TEXTS = f"stages.corpus.sources=[{{path: '{QUICKSTART.parent}/texts/shakespeare/m[ae]*.txt'}}]"


@pytest.fixture
def evaluated(tmp_path: Path) -> Path:
    """The quickstart up to its evaluation: two jobs fewer a member."""
    whole = QUICKSTART.read_text(encoding="utf-8")
    recipe = tmp_path / "evaluated.yaml"
    recipe.write_text(whole[: whole.index("  quantized:\n")], encoding="utf-8")
    return recipe


def statuses(slurm: Cluster, run: Path) -> list[str]:
    return [row["status"] for row in status(slurm, run)["sweep"]]


def arrays(run: Path) -> list[str]:
    return [job["array"] for job in json.loads((run / "slurm" / "jobs.json").read_text())]


def test_an_array_of_four_members_runs_to_a_table_of_four(
    slurm: Cluster, run_folder: Path, evaluated: Path
) -> None:
    rates = [1e-3, 2e-3, 3e-3, 4e-3]
    call = ["run", evaluated, *TINY, FEW_TEXTS, f"sweep.{RATE}={rates}", "--on", "slurm"]
    done = llmscale(slurm, *call, "--run-dir", run_folder, "--json")
    assert done.returncode == 0, done.stderr
    assert "4 of 4 members are finished" in done.stderr
    assert arrays(run_folder) == ["0-3"]
    [array] = json.loads((run_folder / "slurm" / "jobs.json").read_text())
    ends = [slurm.wait_for(f"{array['job']}_{number}", ENDED) for number in range(4)]
    assert ends == ["COMPLETED"] * 4
    told = status(slurm, run_folder)
    assert [stage["stage"] for stage in told["stages"]] == ["corpus", "tokenizer"]
    rows = told["sweep"]
    assert rows == json.loads(done.stdout)["sweep"]
    assert [row["member"] for row in rows] == ["000", "001", "002", "003"]
    assert [row["values"] for row in rows] == [{RATE: rate} for rate in rates]
    assert [row["status"] for row in rows] == ["finished"] * 4
    assert len({row["metrics"]["validation_loss"] for row in rows}) == 4
    again = llmscale(slurm, *call, "--run-dir", run_folder, "--detach", "--json")
    assert json.loads(again.stdout)["jobs"] == []


def test_a_requeued_member_goes_on_alone_and_a_cancelled_one_is_all_that_is_submitted_again(
    slurm: Cluster, run_folder: Path
) -> None:
    call = ["run", QUICKSTART, *TINY, f"sweep.{STEPS}=[3000, 4]", "--on", "slurm", "--detach"]
    call += ["--stages", "corpus,tokenizer,pretrain", "--run-dir", run_folder, "--json"]
    array = json.loads(llmscale(slurm, *call).stdout)["jobs"][-1]
    long, short = (run_folder / "sweep" / number for number in ("000", "001"))
    until(lambda: steps(long) > 2 and steps(short) == 4)
    assert slurm.wait_for(f"{array}_1", ENDED) == "COMPLETED"

    assert json.loads(llmscale(slurm, *call).stdout)["jobs"][-1] == array
    slurm.command("scancel", "--batch", "--signal=USR1", f"{array}_0")
    until(lambda: slurm.job(f"{array}_0").get("Restarts") == "1")
    before = steps(long)
    assert slurm.state(f"{array}_1") == "COMPLETED"
    until(lambda: steps(long) > before + 2)
    logged = (long / "pretrain" / "metrics.jsonl").read_text().splitlines()
    numbers = [line["step"] for line in map(json.loads, logged) if "loss" in line]
    assert numbers == list(range(1, len(numbers) + 1))
    assert f"job {array}_0 (RUNNING" in str(status(slurm, long)["running"])

    assert f"asked job {array}_0 to save" in llmscale(slurm, "cancel", run_folder).stdout
    until(lambda: slurm.state(f"{array}_0") not in ("RUNNING", "COMPLETING"))
    assert statuses(slurm, run_folder)[0] == "interrupted"
    llmscale(slurm, *call)
    assert arrays(run_folder) == ["0"]


def test_a_job_that_leads_its_allocation_runs_the_members_one_after_the_other(
    slurm: Cluster, run_folder: Path, evaluated: Path
) -> None:
    sweep = f"sweep.{RATE}=[1e-3, 3e-3]"
    job = sbatch(
        slurm, run_folder, *TINY, FEW_TEXTS, sweep, options=["--nodes=1"], recipe=evaluated
    )
    completed(slurm, job, run_folder)
    log = Path(f"{run_folder}.log").read_text()
    assert statuses(slurm, run_folder) == ["finished", "finished"]
    assert log.index("member 000") < log.index("member 001")
