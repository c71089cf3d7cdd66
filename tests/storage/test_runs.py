"""Runs at a URL: the same curve, whatever is lost in the middle, and nothing half-visible."""

import hashlib
import json
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from llmscale.storage import Storage
from tests.cluster.conftest import local_curve, local_run  # noqa: F401
from tests.cluster.runs import STEPS, Curve, until
from tests.ranks import run_recipe
from tests.rlhf.test_placement import placed
from tests.rlhf.test_ppo import iterations
from tests.storage.runs import (
    CALL,
    curve_at,
    llmscale,
    manifest_at,
    put_tokens,
    started,
    whole_steps,
)
from tests.storage.server import Server, Way

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


class Reader:
    """Looks again and again whether a checkpoint that counts has all its files, and whole."""

    def __init__(self, url: str, server: Server) -> None:
        self.looks, self.wrong = 0, []  # type: ignore[var-annotated]
        self._storage = _direct(url, server)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(30)

    def _look(self) -> None:
        while not self._over.wait(0.05):
            names = self._storage.versions("pretrain/checkpoints")
            for name in (name for name in names if name.endswith("/COMPLETE")):
                complete = self._storage.read(name)
                if complete is not None:
                    self.looks += 1
                    self._require(name, complete)

    def _require(self, name: str, complete: bytes) -> None:
        for file, expected in json.loads(complete).items():
            content = self._storage.read(name.removesuffix("COMPLETE") + file)
            holds = content is not None and hashlib.sha256(content).hexdigest() == expected
            if not holds and self._storage.read(name) == complete:
                self.wrong.append(f"{name}: {file}")


def _direct(url: str, server: Server) -> Storage:
    """A storage that nothing cuts."""
    import fsspec

    storage = Storage(url)
    storage._files = fsspec.filesystem(
        "s3",
        endpoint_url=f"http://127.0.0.1:{server.port}",
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    return storage


def test_a_run_at_a_url_has_the_curve_of_one_at_a_path_and_every_command_takes_it(
    url: str,
    local_curve: Curve,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = llmscale(*CALL, "--run-dir", url)
    assert f"report: {url}/report.html" in said
    assert curve_at(url) == local_curve
    assert manifest_at(url)["status"] == "finished"
    assert {"hf", "logs", "metrics.jsonl", "checkpoints", "tokens"} <= set(
        manifest_at(url)["outputs"]
    )
    assert whole_steps(url)[-1] == STEPS

    monkeypatch.setenv("LLMSCALE_CACHE", str(tmp_path / "another machine"))
    assert "finished" in llmscale("status", url)
    assert "rank 1 of 2" in llmscale("logs", url, "--rank", 1, "--stage", "pretrain")
    assert "nothing runs" in llmscale("cancel", url)
    assert f"wrote {url}/report.html" in llmscale("report", url)
    told = llmscale("export", f"{url}:pretrain", "--out", tmp_path / "hf")
    assert "from step" in told
    text = llmscale("generate", f"{url}:pretrain", "--prompt", "It", "--max-new-tokens", 3)
    assert text.startswith("It")
    again = llmscale(*CALL, "--run-dir", url)
    assert "pretrain: finished before" in again
    assert "secret-of-the-test" not in said + told + again
    longer = llmscale(*CALL, "stages.pretrain.steps=24", "--run-dir", url)
    assert f"the former result is kept in {url}/superseded/pretrain-1" in longer
    assert len(curve_at(url)) == 24


def test_a_storage_gone_in_the_middle_of_an_upload_and_back_loses_nothing_and_shows_no_half(
    url: str,
    way: Way,
    server: Server,
    local_run: Path,  # noqa: F811
    local_curve: Curve,  # noqa: F811
) -> None:
    put_tokens(local_run, url)
    with Reader(url, server) as reader:
        run = started(*CALL, "--run-dir", url)
        try:
            direct = _direct(url, server)
            until(lambda: bool(direct.versions("pretrain/checkpoints")), 120)
            way.cut_after = 10_000
            assert way.is_cut.wait(60)
            time.sleep(12)
            way.mend()
            until(lambda: bool(whole_steps(url)), 60)
            server.stand_still()
            time.sleep(6)
            server.go_on()
            said, complaints = run.communicate(timeout=200)
        finally:
            server.go_on()
            run.kill()
    assert run.returncode == 0, said + complaints
    assert curve_at(url) == local_curve
    assert manifest_at(url)["status"] == "finished"
    assert reader.looks > 0
    assert reader.wrong == []


def test_a_run_killed_in_the_middle_of_an_upload_goes_on_elsewhere_with_the_same_curve(
    url: str,
    way: Way,
    server: Server,
    local_run: Path,  # noqa: F811
    local_curve: Curve,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_tokens(local_run, url)
    with Reader(url, server) as reader:
        run = started(*CALL, "--run-dir", url)
        until(lambda: bool(whole_steps(url)), 120)
        before = whole_steps(url)[-1]
        way.cut_after = 30_000
        assert way.is_cut.wait(60)
        family = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(signal.SIGKILL)
        run.wait()
        psutil.wait_procs(family, 20)
        way.mend()
        assert whole_steps(url)[-1] >= before
        assert len(curve_at(url)) >= whole_steps(url)[-1]
        shutil.rmtree(tmp_path / "cache")
        monkeypatch.setenv("LLMSCALE_CACHE", str(tmp_path / "another machine"))
        llmscale(*CALL, "--run-dir", url)
    assert curve_at(url) == local_curve
    assert (reader.looks > 0, reader.wrong) == (True, [])


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    url: str,
    local_run: Path,  # noqa: F811
    local_curve: Curve,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_tokens(local_run, url)
    llmscale(*CALL, "--run-dir", url)
    storage, newest = Storage(url), whole_steps(url)[-1]
    manifest = manifest_at(url)
    storage.write("pretrain/manifest.json", json.dumps({**manifest, "status": "failed"}).encode())
    folder = f"pretrain/checkpoints/step-{newest:08d}"
    storage.write(f"{folder}/state.json", b"{}")
    monkeypatch.setenv("LLMSCALE_CACHE", str(tmp_path / "another machine"))
    llmscale(*CALL, "--run-dir", url)
    log = (storage.read("pretrain/logs/rank-00000.log") or b"").decode()
    wrong = f"{url}/{folder}: the checksum of state.json does not hold; using the one before"
    assert wrong in log
    assert curve_at(url) == local_curve


def test_a_critic_on_ranks_of_its_own_has_its_state_at_the_url_and_goes_on_elsewhere(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placement = {"valuers": {"roles": ["critic"]}}
    recipe = placed(tmp_path / "home", 2, placement=placement)
    whole = run_recipe(recipe, tmp_path / "whole", [])
    llmscale("run", recipe, "--run-dir", url)
    storage = Storage(url)
    assert any("step-00000004/critic/" in name for name in storage.versions("ppo/checkpoints"))
    storage.write("ppo/checkpoints/step-00000006/state.json", b"{}")
    manifest = {**manifest_at(url, "ppo"), "status": "failed"}
    storage.write("ppo/manifest.json", json.dumps(manifest).encode())
    monkeypatch.setenv("LLMSCALE_CACHE", str(tmp_path / "another machine"))
    llmscale("run", recipe, "--run-dir", url)
    log = (storage.read("ppo/logs/rank-00000.log") or b"").decode()
    assert "step-00000006: the checksum of state.json does not hold; using the one before" in log
    lines = map(json.loads, (storage.read("ppo/metrics.jsonl") or b"").splitlines())
    told = [line for line in lines if "loss" in line]
    for found, wanted in zip(told, iterations(whole), strict=True):
        for name in ("step", "loss", "value_loss", "reward"):
            assert found[name] == wanted[name]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--on", "slurm"], "on SLURM a run is in a folder that all nodes share"),
        (["sweep={stages.pretrain.steps: [40, 41]}"], "a sweep is in a folder"),
    ],
)
def test_what_cannot_be_at_a_url_is_one_line(words: list[str], line: str) -> None:
    run = started("run", CALL[1], *words, "--run-dir", "s3://bucket1/refused")
    complaints = run.communicate(timeout=60)[1]
    assert run.returncode == 2
    assert complaints.startswith("s3://bucket1/refused: ") and line in complaints
    assert complaints.count("\n") == 1
