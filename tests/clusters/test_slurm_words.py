"""What is written for SLURM, and what its words are taken to mean."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmscale.clusters.base import ClusterSettings, Job, Task
from llmscale.clusters.slurm.script import BatchJob
from llmscale.clusters.slurm.settings import SlurmSettings
from llmscale.clusters.slurm.srun import Step, lost_nodes
from llmscale.errors import RecipeError

TRAIN = Job(Path("/runs/a b"), "pretrain", Task("train", 16, 2, on_device=True))
TOKENS = Job(Path("/runs/a b"), "pretrain", Task("tokens"))
NO_CONTROLS = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]))


def cluster(**slurm: object) -> ClusterSettings:
    return ClusterSettings.model_validate(
        {"on": "slurm", "nodes": 2, "ranks_per_node": 8, "device": "cuda", "slurm": slurm}
    )


def script(job: Job, settings: ClusterSettings) -> str:
    return BatchJob("name", job, ("llmscale", "run")).script(settings)


def test_only_training_asks_for_nodes_and_gpus() -> None:
    train, tokens = script(TRAIN, cluster()), script(TOKENS, cluster())
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=8\n#SBATCH --gpus-per-node=8\n" in train
    assert "#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=1\n" in tokens
    assert "gpus" not in tokens


def test_every_setting_stands_in_the_script() -> None:
    settings = cluster(
        partition="gpu",
        account="lab:me",
        qos="high",
        constraint="[a100|h100]&ib",
        time_limit="1-02:30:00",
        gpus_per_node=4,
        cpus_per_rank=6,
        memory_gib_per_node=500,
        extra_lines=["--exclusive", "--comment=two words"],
        save_seconds=300,
    )
    for line in (
        "partition=gpu",
        "account=lab:me",
        "qos=high",
        "constraint=[a100|h100]&ib",
        "time=1-02:30:00",
        "gpus-per-node=4",
        "cpus-per-task=6",
        "mem=500G",
        "exclusive",
        'comment="two words"',
        "signal=B:USR1@300",
        'output="/runs/a b/slurm/%j.log"',
    ):
        assert f"#SBATCH --{line}\n" in script(TRAIN, settings)


@given(st.text().filter(lambda text: "\0" not in text))
def test_a_command_is_read_by_a_shell_as_it_was_meant(text: str) -> None:
    last = BatchJob("name", TOKENS, ("printf", "%s", text)).script(cluster()).split("exec ", 1)[1]
    assert shlex.split(last) == ["printf", "%s", text]


@given(NO_CONTROLS)
def test_an_extra_line_stays_one_line(text: str) -> None:
    lines = script(TRAIN, cluster(extra_lines=[f"--comment={text}"])).splitlines()
    plain = script(TRAIN, cluster()).splitlines()
    assert len(lines) == len(plain) + 1


@pytest.mark.parametrize("folder", ["/runs/100%", "/runs/a\\b", "/runs/a\nb"])
def test_a_run_folder_that_slurm_would_read_otherwise_is_refused(folder: str) -> None:
    with pytest.raises(RecipeError, match="--run-dir"):
        script(Job(Path(folder), "pretrain", Task("tokens")), cluster())


def command(**slurm: object) -> list[str]:
    settings = cluster(**slurm).slurm
    assert settings is not None
    return Step(TRAIN, settings).command()


def test_srun_starts_a_task_a_rank_and_ends_all_with_the_first() -> None:
    found = command()
    assert {"--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--kill-on-bad-exit=1"} <= set(found)
    assert Job.from_json(found[-1]) == TRAIN


def test_torchrun_has_a_task_a_node() -> None:
    found = command(launcher="torchrun")
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= set(found)


def test_a_container_is_given_to_pyxis_with_the_run_folder_mounted() -> None:
    found = command(
        container={"image": "nvcr.io#nvidia/pytorch:25.01-py3", "mounts": ["/data:/data:ro"]},
        environment={"HF_HOME": "/data/hf"},
    )
    assert "--container-image=nvcr.io#nvidia/pytorch:25.01-py3" in found
    assert "--container-mounts=/runs/a b:/runs/a b,/data:/data:ro" in found
    names = next(a for a in found if a.startswith("--container-env=")).partition("=")[2].split(",")
    assert {"HF_HOME", "LLMSCALE_LAUNCHER", "PYTHONPATH"} <= set(names)
    assert "python3" in found


def test_modules_are_loaded_by_name_before_python(tmp_path: Path) -> None:
    found = command(modules=["cuda/12.4", "nccl"])
    start = found.index("bash")
    end = found.index("--")
    said = tmp_path / "said"
    module = f'module() {{ echo "$@" >> {shlex.quote(str(said))}; }}; export -f module; exec "$@"'
    run = ["bash", "-c", module, "-", *found[start : end + 1], "echo", "$(id)", "a b"]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "$(id) a b"
    assert said.read_text() == "load cuda/12.4\nload nccl\n"


def codes(*said: str, launcher: str = "srun") -> dict[int, int | None]:
    settings = cluster(launcher=launcher).slurm
    assert settings is not None
    return Step(TRAIN, settings).exit_codes(said)


def test_the_first_rank_that_srun_tells_of_comes_first() -> None:
    found = codes(
        "srun: error: node2: task 11: Segmentation fault (core dumped)",
        "srun: error: node2: task 12: Out Of Memory",
        "srun: launch/slurm: _step_signal: Terminating StepId=3.1",
        "srun: error: node1: tasks 0-2,5: Exited with exit code 1",
    )
    assert list(found.items()) == [(11, -11), (12, -9), (0, 1), (1, 1), (2, 1), (5, 1)]


def test_ranks_that_srun_itself_killed_are_not_taken_for_killed() -> None:
    found = codes(
        "srun: error: node2: task 11: Exited with exit code 1",
        "srun: launch/slurm: _step_signal: Terminating StepId=3.1",
        "srun: error: node1: tasks 0-1: Killed",
    )
    assert found == {11: 1, 0: None, 1: None}


def test_a_rank_that_torchrun_tells_of_is_found_by_its_node() -> None:
    line = "1: E1122 api.py:1002] failed (exitcode: -9) local_rank: 3 (pid: 25) of binary: python"
    assert next(iter(codes(line, launcher="torchrun").items())) == (11, -9)


def test_a_node_that_srun_lost_is_named() -> None:
    assert lost_nodes(["srun: error: Node failure on node[2-3]"]) == ["node2", "node3"]
    assert lost_nodes(["srun: error: node2: task 11: Killed"]) == []


TEXTS = ["a b", "'", '"', "$(touch x)", "`id`", "a;b", "a\nb", "a\0b", "-x", "é", "\\", "#", ""]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("field", ["partition", "account", "qos", "constraint", "time_limit"])
def test_a_name_that_a_shell_or_sbatch_would_read_is_refused(field: str, text: str) -> None:
    with pytest.raises(ValueError, match="cannot be given to SLURM; use"):
        SlurmSettings.model_validate({field: text})


@pytest.mark.parametrize("text", TEXTS)
def test_an_environments_text_is_any_text_but_null(text: str) -> None:
    if "\0" in text:
        with pytest.raises(ValueError, match="text without null"):
            SlurmSettings.model_validate({"environment": {"A": text}})
    else:
        assert SlurmSettings.model_validate({"environment": {"A": text}}).environment["A"] == text


@pytest.mark.parametrize("line", ["--output=x", "--array=1-3", "--wrap=id", "--dependency=after:1"])
def test_an_option_that_llmscale_sets_itself_is_refused(line: str) -> None:
    name = re.escape(line.split("=")[0])
    with pytest.raises(ValueError, match=f"{name} is set by llmscale"):
        SlurmSettings.model_validate({"extra_lines": (line,)})


def test_a_job_goes_to_another_process_and_back() -> None:
    assert Job.from_json(TRAIN.to_json()) == TRAIN
    assert "\n" not in TRAIN.to_json()
