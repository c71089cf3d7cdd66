"""Whose error is told: the rank that failed by itself, with its own cause."""

from pathlib import Path

import pytest

from llmscale.artifacts import StageFolder
from llmscale.clusters import failures
from llmscale.clusters.base import Job, Task


@pytest.fixture
def stage(tmp_path: Path) -> StageFolder:
    folder = StageFolder(tmp_path / "pretrain")
    folder.logs.mkdir(parents=True)
    return folder


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path, "pretrain", Task("train", 3))


def test_an_error_of_its_own_comes_before_lost_connections(stage: StageFolder, job: Job) -> None:
    lost = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4711")
    failures.record_failure(stage.log_file(0), lost)
    failures.record_failure(stage.log_file(2), ValueError("no such sample\nmore"))
    failures.record_failure(stage.log_file(1), lost)
    told = failures.first_cause(job, stage, {0: 1, 1: 1, 2: 1}).line
    assert told.startswith("pretrain (train): rank 2 failed: no such sample; see ")
    assert told.endswith("rank-00002.log")


def test_a_killed_rank_comes_before_lost_connections(stage: StageFolder, job: Job) -> None:
    failures.record_failure(stage.log_file(0), RuntimeError("Connection reset by peer"))
    told = failures.first_cause(job, stage, {0: 1, 1: -9, 2: None}).line
    assert "rank 1 failed: killed by SIGKILL (out of memory?)" in told


def test_a_full_disk_is_the_cause_whatever_else_was_said(
    stage: StageFolder, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 4096

    monkeypatch.setattr(failures.shutil, "disk_usage", lambda path: Usage)
    told = failures.first_cause(job, stage, {0: 1, 1: None, 2: None}).line
    assert "rank 0 failed: the disk is full; free space and run the same command again" in told
