"""What moves between a folder and a URL, on a real server."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.artifacts import RunFolder
from llmscale.errors import MachineError, RecipeError, StageError
from llmscale.lease import Lease
from llmscale.mirror import Mirror, cached, opened
from llmscale.storage import Storage
from tests.storage.server import BUCKET, Server, Way, environment


def mirror(url: str, name: str) -> Mirror:
    """One of the URL whose folder is of that name."""
    folder = cached(url, name)
    there = Mirror.of(folder)
    assert there is not None
    return there


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def files(folder: Path) -> dict[str, str]:
    """All in a folder but hidden files."""
    found = (file for file in sorted(folder.rglob("[!.]*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_text() for file in found}


def test_what_one_machine_sends_another_gets_and_a_removal_too(url: str) -> None:
    here, there = mirror(url, "here"), mirror(url, "there")
    put(here.folder, {"corpus/a.bin": "a" * 10, "corpus/deep/b": "b", "recipe.yaml": "r"})
    here.push("recipe.yaml", "corpus")
    there.pull("recipe.yaml", "corpus")
    assert files(there.folder) == files(here.folder)

    (here.folder / "corpus/a.bin").unlink()
    put(here.folder, {"corpus/deep/b": "changed"})
    put(there.folder, {"corpus/of another run": "x"})
    here.push("corpus")
    there.pull("corpus")
    assert files(there.folder) == files(here.folder)


def test_hidden_files_and_checkpoints_stay(url: str) -> None:
    here = mirror(url, "here")
    put(here.folder, {"s/.partial/a": "", "s/.b": "", "s/checkpoints/step-1/c": "", "s/d": ""})
    here.push("s")
    assert list(here.storage.versions()) == ["s/d"]
    here.pull("s")
    assert (here.folder / "s/checkpoints/step-1/c").is_file()


def test_what_is_the_same_on_both_sides_is_not_moved_again(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = mirror(url, "here")
    put(here.folder, {"s/a": "a", "s/b": "b"})
    here.push("s")
    moved: list[str] = []
    monkeypatch.setattr(Storage, "upload", lambda _self, files: moved.extend(files))
    monkeypatch.setattr(Storage, "download", lambda _self, files: moved.extend(files))
    here.push("s")
    here.pull("s")
    mirror(url, "here").push("s")
    assert moved == []
    put(here.folder, {"s/b": "longer"})
    here.push("s")
    assert moved == ["s/b"]


@pytest.fixture(scope="module")
def names_url(server: Server) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(server.port).items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield f"s3://{BUCKET}/names"


names = st.text("ab%+ é#?&=~", min_size=1, max_size=6).filter(lambda name: name.strip() == name)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(names, st.text(max_size=50), min_size=1, max_size=5))
def test_any_name_comes_back_as_it_was(
    names_url: str, tmp_path_factory: pytest.TempPathFactory, contents: dict[str, str]
) -> None:
    base = tmp_path_factory.mktemp("names")
    storage = Storage(f"{names_url}/{base.name}")
    (base / "one").mkdir()
    (base / "two").mkdir()
    put(base / "one" / "s", contents)
    Mirror(base / "one", storage).push("s")
    Mirror(base / "two", storage).pull("s")
    assert files(base / "two" / "s") == files(base / "one" / "s")


def test_a_superseded_stage_is_kept_whole_and_its_place_is_free(url: str) -> None:
    here = mirror(url, "here")
    for number in (1, 2):
        put(here.folder, {"s/manifest.json": f"{number}", "s/hf/model": "m"})
        here.push("s")
        here.storage.write("s/checkpoints/step-00000001/COMPLETE", b"{}")
        kept = here.set_aside("s")
        assert kept == f"{url}/superseded/s-{number}"
        assert list(here.storage.versions("s")) == []
        shutil.rmtree(here.folder / "s")
        assert here.storage.read(f"superseded/s-{number}/manifest.json") == b"%d" % number
        assert set(here.storage.versions(f"superseded/s-{number}")) == {
            f"superseded/s-{number}/{name}"
            for name in ("manifest.json", "hf/model", "checkpoints/step-00000001/COMPLETE")
        }
        here.pull("s")


def test_a_cut_is_got_over_and_said(url: str, way: Way) -> None:
    said: list[str] = []
    storage = Storage(url, say=said.append)
    big = Path(cached(url)) / "big"
    big.write_bytes(bytes(range(256)) * 2**15)
    way.cut_after = 2**21
    upload = threading.Thread(target=storage.upload, args=({"s/big": big},))
    upload.start()
    assert way.is_cut.wait(20)
    time.sleep(9)  # for longer than s3fs itself tries
    assert upload.is_alive()
    way.mend()
    upload.join(60)
    assert not upload.is_alive()
    assert storage.read("s/big") == big.read_bytes()
    assert len(said) == 1
    assert said[0].startswith(f"{url}: cannot be reached (")
    assert said[0].endswith("; trying again")


def test_a_storage_that_stays_away_is_one_line(url: str, way: Way) -> None:
    way.cut()
    with pytest.raises(
        StageError, match=rf"^{url}: cannot be reached \(.*\), tried for \d+ s; run"
    ):
        Storage(url, patience_seconds=1, say=lambda _line: None).read("a")


def test_what_does_not_pass_is_one_line_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        MachineError, match=r"s3://absent-bucket/run: .*bucket does not exist; check"
    ):
        opened("s3://absent-bucket/run")
    with pytest.raises(RecipeError, match="nowhere://x/y: no storage is known by nowhere://"):
        opened("nowhere://x/y")
    with pytest.raises(RecipeError, match="s3:///x: names no bucket"):
        opened("s3:///x")
    with pytest.raises(MachineError, match=r"gs://b/x: .* missing; pip install 'llmscale\[gcs\]'"):
        opened("gs://b/x")
    with pytest.raises(RecipeError) as refused:
        opened("s3://user:very-secret@bucket/x")
    assert "very-secret" not in str(refused.value)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(MachineError, match=r"(?i)credentials"):
        opened(f"s3://{BUCKET}/another")


def test_one_of_two_takes_the_lock_and_the_other_is_told_who_has_it(url: str) -> None:
    with Lease(url, print).held():
        holder = Lease(url, print).holder()
        assert holder is not None and holder.is_alive()
        refused = pytest.raises(RecipeError, match=rf"{url}: process \d+ on .* is running")
        with refused, Lease(url, print).held():
            pass
    assert Lease(url, print).holder() is None
    with Lease(url, print).held():
        pass


def test_of_many_that_try_at_once_one_gets_the_lock(url: str) -> None:
    Storage(url).read("warm")
    start, got, refused, done = threading.Barrier(6), [], [], threading.Event()

    def attempt(number: int) -> None:
        start.wait()
        try:
            with Lease(url, print).held():
                got.append(number)
                done.wait(20)
        except RecipeError:
            refused.append(number)
        if len(refused) == 5:
            done.set()

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(got), len(refused)) == (1, 5)


def test_a_silent_holder_elsewhere_is_waited_for_and_then_followed_and_learns_it(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmscale.lease.HEARTBEAT_SECONDS", 1000.0)
    lost: list[str] = []
    with Lease(url, print, on_loss=lost.append).held():
        monkeypatch.setattr("llmscale.holder.Holder.is_here", lambda _self: False)
        monkeypatch.setattr("llmscale.lease.HEARTBEAT_SECONDS", 0.2)
        said: list[str] = []
        with Lease(url, said.append, stale_seconds=2).held():
            assert len(said) == 1 and "waiting up to 2 s" in said[0]


def test_a_holder_elsewhere_that_beats_is_not_followed_however_long_one_waits(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmscale.lease.HEARTBEAT_SECONDS", 0.3)
    with Lease(url, print).held():
        monkeypatch.setattr("llmscale.holder.Holder.is_here", lambda _self: False)
        with pytest.raises(RecipeError), Lease(url, print, stale_seconds=3).held():
            pass


def test_a_holder_that_was_followed_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmscale.lease.HEARTBEAT_SECONDS", 0.3)
    lost: list[str] = []
    with Lease(url, print, on_loss=lost.append).held():
        Storage(url).create(".lock/00000002.json", b"{}")
        deadline = time.monotonic() + 10
        while not lost and time.monotonic() < deadline:
            time.sleep(0.1)
    assert lost == [f"{url}: another run holds this folder; stopping"]


def test_a_run_folder_at_a_url_is_locked_there(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(cached(url))
    with folder.locked():
        assert folder.holder() is not None
        elsewhere = RunFolder(cached(url, "another cache"))
        with pytest.raises(RecipeError, match=url), elsewhere.locked():
            pass
    assert folder.holder() is None
