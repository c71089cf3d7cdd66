"""One writer a folder, on any file system: who holds it, who may take it over, who must stop."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from llmscale import holder as holders
from llmscale import lock
from llmscale.artifacts import RunFolder
from llmscale.errors import RecipeError
from llmscale.holder import Holder
from llmscale.lock import FolderLock
from llmscale.runs import cancel

FORK = multiprocessing.get_context("fork")
HOLD = """
import sys, time
from pathlib import Path
from llmscale.lock import FolderLock
with FolderLock(Path(sys.argv[1])).held():
    print("holding", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    lock._server_clock.cache_clear()


@contextmanager
def another_process(folder: Path) -> Iterator[subprocess.Popen]:
    """A process of this machine that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        try:
            assert process.stdout.readline() == "holding\n"
            yield process
        finally:
            process.kill()


def record(folder: Path, seconds_ago: float, **fields: object) -> Holder:
    """Writes a record as another host's process would have, with its last heartbeat."""
    holder = replace(Holder.current(), **{"host": "elsewhere", "process": 7, **fields})
    place = folder / ".holder"
    place.write_text(json.dumps(asdict(holder)))
    os.utime(place, (time.time() - seconds_ago,) * 2)
    return holder


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def takes(folder: Path) -> bool:
    try:
        with FolderLock(folder).held():
            return True
    except RecipeError:
        return False


def test_a_held_folder_refuses_and_says_who_holds_it(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        with pytest.raises(RecipeError) as refusal, RunFolder(tmp_path).locked():
            pass
        assert str(refusal.value) == (
            f"{tmp_path}: process {process.pid} on {socket.gethostname()} is running in this "
            "folder; wait for it, cancel it, or choose another --run-dir"
        )
        assert files(tmp_path) == [".holder"]


def test_a_process_does_not_lock_a_folder_twice(tmp_path: Path) -> None:
    with RunFolder(tmp_path).locked():
        assert not takes(tmp_path)
        assert not takes(tmp_path)
        assert RunFolder(tmp_path).holder() is not None


def test_a_released_folder_is_free_and_empty(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path).locked():
        raise ZeroDivisionError
    assert files(tmp_path) == []
    assert RunFolder(tmp_path).holder() is None
    assert takes(tmp_path)


def test_a_folder_whose_holder_was_killed_here_is_free_at_once(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert RunFolder(tmp_path).holder() is None, "not even its parent has noticed yet"
        assert takes(tmp_path)
    assert files(tmp_path) == []


def test_a_process_id_used_again_is_not_the_holder(tmp_path: Path) -> None:
    own = Holder.current()
    record(tmp_path, 0, host=own.host, process=own.process, started=own.started - 2.5)
    assert takes(tmp_path)
    record(tmp_path, 0, host=own.host, process=own.process, started=own.started - 1.5)
    assert not takes(tmp_path)


def test_a_stopped_process_of_this_host_keeps_the_folder_however_long(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        os.utime(tmp_path / ".holder", (0, 0))
        assert not takes(tmp_path)


def test_a_container_of_the_same_host_name_is_judged_by_its_heartbeat(tmp_path: Path) -> None:
    gone = {"host": socket.gethostname(), "process": 2**22 + 1, "processes": "pid:[1]"}
    record(tmp_path, 0, **gone)
    assert not takes(tmp_path)
    record(tmp_path, lock.STALE_SECONDS + 5, **gone)
    assert takes(tmp_path)


def test_a_fresh_record_of_another_host_refuses(tmp_path: Path) -> None:
    holder = record(tmp_path, lock.STALE_SECONDS - 5)
    assert not takes(tmp_path)
    assert RunFolder(tmp_path).holder() == holder
    with pytest.raises(RecipeError, match=r"process 7 on elsewhere runs it; cancel it there"):
        cancel(RunFolder(tmp_path))


def test_a_stale_record_of_another_host_is_taken_over(tmp_path: Path) -> None:
    record(tmp_path, lock.STALE_SECONDS + 5)
    assert RunFolder(tmp_path).holder() is None
    with RunFolder(tmp_path).locked():
        assert files(tmp_path) == [".holder"]
        assert "elsewhere" not in (tmp_path / ".holder").read_text()


def test_a_wrong_local_clock_frees_nobodys_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, 0)
    wrong = time.time() + 10_000
    monkeypatch.setattr(time, "time", lambda: wrong)
    assert RunFolder(tmp_path).holder() is not None
    assert not takes(tmp_path)


def test_the_heartbeat_keeps_the_record_fresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    with FolderLock(tmp_path).held():
        os.utime(tmp_path / ".holder", (0, 0))
        until(lambda: (tmp_path / ".holder").stat().st_mtime > time.time() - 5)


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("now_held_by", ["process 7 on elsewhere", "nobody"])
def test_the_former_holder_notices_and_leaves_the_record_of_the_next(
    now_held_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    losses: list[str] = []
    with FolderLock(tmp_path, losses.append).held():
        if now_held_by == "nobody":
            (tmp_path / ".holder").unlink()
        else:
            beside = tmp_path / "beside"
            beside.mkdir()
            record(beside, 0)
            (beside / ".holder").replace(tmp_path / ".holder")
            beside.rmdir()
        until(lambda: losses)
    assert losses == [f"{tmp_path}: {now_held_by} holds this folder now; stopping"]
    assert files(tmp_path) == ([] if now_held_by == "nobody" else [".holder"])


def test_a_process_that_lost_its_folder_stops_as_if_asked_to(tmp_path: Path) -> None:
    program = HOLD.replace(
        "import sys", "import llmscale.lock; llmscale.lock.HEARTBEAT_SECONDS = 0.01\nimport sys"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "holding\n"
    (tmp_path / ".holder").unlink()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
    assert errors == f"{tmp_path}: nobody holds this folder now; stopping\n"


@pytest.mark.parametrize(
    ("job", "restart", "free"),
    [("12", 1, True), ("12", 2, False), ("12", 3, False), ("13", 1, False), (None, 0, False)],
)
def test_a_requeued_job_takes_over_its_own_earlier_start_and_no_other(
    job: str | None, restart: int, free: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, 0, job=job, restart=restart)
    assert not takes(tmp_path), "who is no job at all must wait"
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert takes(tmp_path) == free


def test_the_first_start_of_a_job_is_counted_as_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with FolderLock(tmp_path).held():
        written = json.loads((tmp_path / ".holder").read_text())
    assert (written["job"], written["restart"]) == ("12", 0)


def test_looking_writes_nothing_where_the_holder_is_on_this_host(tmp_path: Path) -> None:
    with FolderLock(tmp_path).held():
        os.utime(tmp_path, (0, 0))
        assert RunFolder(tmp_path).holder() is not None
        assert tmp_path.stat().st_mtime == 0


@pytest.mark.parametrize(("seconds_ago", "running"), [(0, True), (100, False)])
def test_a_folder_that_cannot_be_written_is_looked_at_all_the_same(
    seconds_ago: float, running: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, seconds_ago)

    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)  # permissions do not stop root
    monkeypatch.setattr(Path, "unlink", refuse)
    assert (RunFolder(tmp_path).holder() is not None) == running


def test_a_full_disk_is_told_as_it_is_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), RunFolder(tmp_path).locked():
        pass
    assert files(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff", b'{"token": "../x"}'])
def test_a_record_nobody_can_read_is_judged_by_its_age(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".holder").write_bytes(content)
    assert not takes(tmp_path)
    os.utime(tmp_path / ".holder", (0, 0))
    assert takes(tmp_path)


def test_a_link_whose_answer_was_lost_counts_as_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_sent_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_sent_twice)
    assert takes(tmp_path)
    record(tmp_path, 1000)
    assert takes(tmp_path)


def test_what_killed_processes_left_is_removed_by_the_next(tmp_path: Path) -> None:
    dead = record(tmp_path, 0, host=socket.gethostname(), process=2**22 + 1)
    for name in (".holder.new.12", f".holder.{dead.token}", f".holder.{dead.token}.{dead.token}"):
        os.link(tmp_path / ".holder", tmp_path / name)
    with FolderLock(tmp_path).held():
        assert files(tmp_path) == [".holder"]


# Races


def race(folder: Path, rounds: int, barrier, wins) -> None:
    for number in range(rounds):
        barrier.wait()
        try:
            with FolderLock(folder / str(number)).held():
                with wins.get_lock():
                    wins[number] += 1
                barrier.wait()
        except RecipeError:
            barrier.wait()


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_of_processes_racing_for_a_dead_record_exactly_one_wins(
    processes: int, tmp_path: Path
) -> None:
    rounds = 150
    for number in range(rounds):
        folder = tmp_path / str(number)
        folder.mkdir()
        record(folder, 0, host=socket.gethostname(), process=2**22 + 1)
    barrier, wins = FORK.Barrier(processes, timeout=60), FORK.Array("i", rounds)
    racers = [
        FORK.Process(target=race, args=(tmp_path, rounds, barrier, wins)) for _ in range(processes)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    assert list(wins) == [1] * rounds


def runs(process: int) -> bool:
    """Whether a process runs; one that ended may wait for its parent's notice as a zombie."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def work_and_die(folder: Path, seed: int) -> None:
    """Tries to lock; adds to a file as only one writer can; ends well, or is killed anywhere."""
    chance = random.Random(seed)
    delay = chance.choice([None, chance.uniform(0, 0.01)])
    if delay is not None:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, delay)
    try:
        with FolderLock(folder).held():
            inside = os.open(folder / "inside", os.O_CREAT | os.O_RDWR)
            before = os.read(inside, 100).decode()
            if before and runs(int(before)):
                (folder / "together").write_text(f"{before} and {os.getpid()}")
            os.pwrite(inside, f"{os.getpid():08d}".encode(), 0)
            time.sleep(chance.uniform(0, 0.003))
            (folder / "inside").unlink()
            (folder / "entries").open("a").write("x")
    except RecipeError:
        pass


def keep_working(folder: Path, seed: int, rounds: int) -> None:
    for number in range(rounds):
        child = FORK.Process(target=work_and_die, args=(folder, seed * 1000 + number))
        child.start()
        child.join()


def test_killed_anywhere_processes_never_hold_a_folder_together_nor_for_ever(
    tmp_path: Path,
) -> None:
    workers = [FORK.Process(target=keep_working, args=(tmp_path, seed, 60)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not (tmp_path / "together").exists()
    assert (tmp_path / "entries").stat().st_size > 10
    for leftover in tmp_path.glob(".holder.*"):
        os.utime(leftover, (0, 0))  # a record that was never written whole goes by its age
    with FolderLock(tmp_path).held():
        assert [path.name for path in tmp_path.glob(".holder*")] == [".holder"]


Burst = tuple[int, int, bool]
"""Which process goes on, by how many steps, and whether it is killed before the last."""


class Killed(BaseException):
    """A process of a model ends here, and does nothing more."""


class Model:
    """Threads as processes: each takes its steps on the file system one at a time, in a planned
    order, and may be killed before any of them. Who is dead is seen dead at once."""

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder = folder
        self.turns = {str(100 + number): threading.Semaphore(0) for number in range(processes)}
        self.back = threading.Semaphore(0)
        self.killed: set[str] = set()
        self.gone: set[str] = set()
        self.holding: set[str] = set()
        self.taken = 0
        self.errors: list[BaseException] = []

    def run(self, plan: Iterator[Burst]) -> None:
        threads = [threading.Thread(target=self.process, name=name) for name in self.turns]
        for thread in threads:
            thread.start()
        rest = ((number, 1, False) for number in itertools.cycle(range(len(threads))))
        for number, steps, kill in itertools.chain(plan, rest):
            if not self.turns:
                break
            name = threads[number].name
            for step in range(steps):
                if name in self.turns:
                    if kill and step == steps - 1:
                        self.killed.add(name)
                    self.turns[name].release()
                    self.back.acquire()
        for thread in threads:
            thread.join()

    def step(self) -> None:
        """Waits until it is this process's turn; all but processes go on."""
        name = threading.current_thread().name
        if name not in self.turns or name in self.gone:
            return
        self.back.release()
        self.turns[name].acquire()
        if name in self.killed:
            self.gone.add(name)
            self.holding.discard(name)
            raise Killed

    def process(self) -> None:
        name = threading.current_thread().name
        self.turns[name].acquire()
        try:
            for _ in range(3):
                with suppress(RecipeError):
                    self.hold_once(name)
        except Killed:
            pass
        except BaseException as error:
            self.errors.append(error)
        self.gone.add(name)
        del self.turns[name]
        self.back.release()

    def hold_once(self, name: str) -> None:
        folder_lock, own = FolderLock(self.folder), Holder.current()
        folder_lock._take(own)
        self.holding.add(name)
        self.taken += 1
        assert self.holding == {name}
        self.step()
        self.holding.discard(name)
        folder_lock._release(own)

    def is_alive(self, holder: Holder) -> bool:
        return holder.process >= 100 and str(holder.process) not in self.gone


@pytest.fixture
def run_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int, Iterable[Burst]], None]:
    """Lets the processes of a model race for a dead record; fails if two ever hold the folder."""
    models: list[Model] = []

    def after_a_turn(function):
        def stepped(*arguments, **options):
            models[-1].step()
            return function(*arguments, **options)

        return stepped

    def current(_class: type) -> Holder:
        name = threading.current_thread().name
        process = int(name) if name.isdigit() else 1
        return replace(own, process=process, token=os.urandom(8).hex())

    own = Holder.current()
    monkeypatch.setattr(Holder, "current", classmethod(current))
    monkeypatch.setattr(Holder, "is_alive", lambda holder: models[-1].is_alive(holder))
    monkeypatch.setattr(lock, "read", after_a_turn(holders.read))
    monkeypatch.setattr(lock, "POLL_SECONDS", 0)
    monkeypatch.setattr(os, "link", after_a_turn(os.link))
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    monkeypatch.setattr(Path, "unlink", after_a_turn(Path.unlink))
    monkeypatch.setattr(Path, "replace", after_a_turn(Path.replace))

    def run(processes: int, plan: Iterable[Burst]) -> None:
        folder = tmp_path / str(len(models))
        folder.mkdir()
        models.append(Model(folder, processes))
        record(folder, 0, host=own.host, process=1)
        models[-1].run(iter(plan))
        assert not models[-1].errors, models[-1].errors
        assert models[-1].taken or models[-1].killed, "nobody got it"

    return run


@pytest.mark.parametrize("seed", range(6))
def test_in_no_order_of_steps_and_kills_do_two_hold_a_folder(seed: int, run_model) -> None:
    chance = random.Random(seed)
    for _ in range(100):
        processes = chance.randint(2, 4)
        run_model(
            processes,
            [
                (chance.randrange(processes), chance.randint(1, 12), chance.random() < 0.2)
                for _ in range(30)
            ],
        )


@pytest.mark.parametrize("late", range(1, 9))
def test_who_saw_a_dead_record_leaves_the_one_that_followed_it_to_others(
    late: int, run_model
) -> None:
    """The first sees the record dead and stands still; the second replaces it and is killed; the
    third is about to replace that one when the first goes on."""
    for seen, early in itertools.product((2, 3), range(1, 11)):
        run_model(3, [(0, seen, False), (1, 14, True), (2, early, False), (0, late, False)])


def test_a_release_that_comes_too_late_leaves_the_next_holders_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former, following = FolderLock(tmp_path), FolderLock(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    own = Holder.current()
    former._take(own)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    next_own = Holder.current()
    looks = []

    def look_and_stand_still(place: Path, holder: Holder) -> bool:
        looks.append(is_its(place, holder))
        if len(looks) == 1:
            following._take(next_own)
        return looks[-1]

    is_its = lock._is
    monkeypatch.setattr(lock, "_is", look_and_stand_still)
    former._release(own)
    assert looks[0]
    assert is_its(tmp_path / ".holder", next_own)
    assert files(tmp_path) == [".holder"]
