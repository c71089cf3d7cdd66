"""What is decided for Ray without a cluster: the order of ranks, calls, uploads, fewer ranks."""

import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmscale import runs
from llmscale.artifacts import RunFolder, fingerprint, version_of
from llmscale.clusters.base import Job, Task
from llmscale.clusters.failures import Failure
from llmscale.clusters.history import End, History, Start, start_until_done
from llmscale.clusters.ray import jobs
from llmscale.clusters.ray.rank_actor import interface_of
from llmscale.clusters.ray.seats import Seat, lost_nodes, order_by_node, told_placement
from llmscale.errors import MachineError
from llmscale.recipe.recipe import load_recipe
from tests.conftest import QUICKSTART, ROOT
from tests.small import at

UPLOAD = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_{}/recipes"


def seats(*nodes: str, port: int = 1) -> list[Seat]:
    return [Seat(None, rank, node, port, 0, 1) for rank, node in enumerate(nodes)]


def llmscale(*arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "llmscale", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    return done, time.monotonic() - start


@given(st.dictionaries(st.integers(0, 64), st.sampled_from("abcd"), min_size=1))
def test_the_ranks_of_a_node_are_in_a_row_and_full_nodes_come_first(
    nodes: dict[int, str],
) -> None:
    order = order_by_node(nodes)
    assert sorted(order) == sorted(nodes)
    runs = [name for name, _ in groupby(nodes[number] for number in order)]
    sizes = [Counter(nodes.values())[name] for name in runs]
    assert len(runs) == len(set(runs))
    assert sizes == sorted(sizes, reverse=True)


def test_where_ranks_are_is_told_with_groups_that_are_torn() -> None:
    assert told_placement(seats("a", "a", "b", "b"), neighbours=2) == (
        "ranks 0-1 on a, ranks 2-3 on b; tensor-parallel groups of 2 are each on one node"
    )
    assert "tensor-parallel ranks 2-3 are on different nodes" in told_placement(
        seats("a", "a", "a", "b"), neighbours=2
    )


def test_a_node_where_nobody_listens_is_lost() -> None:
    assert lost_nodes(seats("127.0.0.1", port=1)) == ["127.0.0.1"]


def test_any_address_of_loopback_is_on_its_interface() -> None:
    assert interface_of("127.0.0.1") == interface_of("127.0.2.7") is not None
    assert interface_of("203.0.113.7") is None


def test_what_a_job_uploads_again_is_the_same_input(tmp_path: Path) -> None:
    first, second = (tmp_path / f"_ray_pkg_{name}" / "text.txt" for name in ("0a1b", "2c3d"))
    for file in (first, second):
        file.parent.mkdir()
        file.write_text("to be")
    os.utime(second, (1, 1))
    assert version_of(first) == version_of(second)
    assert fingerprint(str(first)) == fingerprint(str(second))
    second.write_text("or not")
    assert version_of(first) != version_of(second)
    assert fingerprint(UPLOAD.format("0a1b")) != fingerprint(UPLOAD.format("0a1b") + "/other")
    assert fingerprint([UPLOAD.format("0a1b"), 1]) == fingerprint([UPLOAD.format("2c3d"), 1])


def test_a_fingerprint_of_long_data_is_there_at_once() -> None:
    """Tried from every character, the pattern of an upload would take hours."""
    script = "from llmscale.artifacts import fingerprint; print(fingerprint(list(range(10**6))))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert len(done.stdout.strip()) == 64


def test_fewer_ranks_keep_the_model_whole_and_the_batch_even() -> None:
    def fewer(*overrides: str) -> tuple[int, ...]:
        recipe = load_recipe(QUICKSTART, overrides)
        return recipe.stages["pretrain"].tasks(recipe.cluster)[-1].fewer

    assert fewer() == (4,)
    assert fewer(*at(1, 1, 8)) == (4, 2, 1)
    assert fewer(*at(2, 1, 4), "stages.pretrain.batch={global: 24, micro: 2}") == (6, 4, 2)
    assert fewer(*at(8, 1, 1), "stages.pretrain.model.key_value_heads=8") == ()


def test_a_job_is_told_to_another_process_as_it_is() -> None:
    job = Job(Path("/runs/x"), "pretrain", Task("train", 4, 2, neighbours=2, fewer=(2, 1)))
    assert Job.from_json(job.to_json()) == job


@pytest.mark.parametrize(
    ("call", "environment", "code", "words"),
    [
        (["--address", "http://x:1"], {}, 2, "add --on ray"),
        (["--on", "ray", "--address", "10.0.0.1:8265"], {}, 2, "like http://HEAD:8265"),
        (["--on", "ray", "--address", "http://127.0.0.1:1"], {}, 3, "http://127.0.0.1:1"),
        (["--on", "ray"], {"RAY_ADDRESS": "127.0.0.1:1"}, 3, "127.0.0.1:1 (RAY_ADDRESS)"),
        (["--on", "ray"], {"RAY_ADDRESS": "http://127.0.0.1:1"}, 3, "http://127.0.0.1:1"),
        (
            ["--on", "ray", "cluster.ray={elastic: true, placement: strict_pack}"],
            {},
            2,
            "cluster.ray.elastic: does not go with placement strict_pack; use pack or spread",
        ),
    ],
)
def test_a_cluster_that_is_not_there_is_told_in_one_line_and_nothing_is_written(
    tmp_path: Path, call: list[str], environment: dict[str, str], code: int, words: str
) -> None:
    run = tmp_path / "run"
    done, seconds = llmscale("run", str(QUICKSTART), *call, "--run-dir", str(run), **environment)
    assert done.returncode == code
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert seconds < 20
    assert not run.exists()


def test_the_light_commands_import_no_ray() -> None:
    code = (
        "import sys, llmscale.launch, llmscale.launch_ray, llmscale.status; "
        "sys.exit('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_dashboard_that_says_nothing_is_given_up_and_never_makes_a_run_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "SECONDS_TO_ANSWER", 0.5)
    folder = RunFolder(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        jobs.note_job(folder, jobs.RayJob("quickstart-1", address, "then", "RUNNING"))
        with pytest.raises(MachineError, match=re.escape(address)):
            runs.cancel(folder)
        known = runs.known_ray_job(folder)
        assert known is not None and str(known) == "Ray job quickstart-1 (UNREACHABLE)"
        runs.require_no_live_jobs(folder)
    noted = jobs.job_of(folder)
    assert noted is not None and noted.state == "RUNNING"


def test_a_start_that_ends_by_an_error_is_noted(tmp_path: Path) -> None:
    history = History(tmp_path)

    def run(_start: Start) -> End:
        raise MachineError("no room")

    with pytest.raises(MachineError):
        start_until_done(
            history,
            restarts=3,
            prepare=lambda: Start("job", "pretrain", "train", "", ()),
            run=run,
            say=print,
        )
    assert [entry["event"] for entry in history.entries()] == ["start", "end"]
    assert history.mishaps()[0]["outcome"] == "no room"


def test_ranks_that_are_asked_to_start_again_do_without_a_word_of_failure(tmp_path: Path) -> None:
    ends = iter([End("room", again=True), End("broken", failure=Failure("broken", 0)), End("done")])
    said: list[str] = []
    start_until_done(
        History(tmp_path),
        restarts=3,
        prepare=lambda: Start("job", "pretrain", "train", "", ()),
        run=lambda _start: next(ends),
        say=said.append,
    )
    assert said == ["room; starting again", "broken; starting again"]
