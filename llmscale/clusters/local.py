"""Ranks as processes of this machine, forked from one process that has imported torch.

Importing torch and megatron-core takes seconds of a core: it happens once, in
multiprocessing's fork server, not once a rank.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from multiprocessing.forkserver import ensure_running
from pathlib import Path

from llmscale.artifacts import RunFolder, StageFolder
from llmscale.clusters.base import Job
from llmscale.clusters.devices import cuda_present
from llmscale.clusters.failures import first_cause, forget_failures
from llmscale.clusters.process import Entry, run_as_rank
from llmscale.clusters.stops import Stops
from llmscale.errors import Interrupted, StageError

OPTIMIZER_IMPORTS = "torch._dynamo"
"""In its first step, for a second."""
PRELOADED = ["llmscale.quiet", "llmscale.stages.train_rank", OPTIMIZER_IMPORTS]
"""What every rank needs."""
SECONDS_FOR_OTHERS_ERRORS = 1.0
POLL_SECONDS = 0.1
GO_ON = "interrupted; run the same command again to go on"


@dataclass(frozen=True)
class LocalCluster:
    """Runs a job's ranks here.

    Args:
        entry: what each rank runs, given the job, its rank and the rendezvous address.
        on_tick: called some times a second while ranks run.
        imports: modules that many ranks need besides, and that take long to import. With a GPU
            they are left to the ranks: some ask for it, and a process forked after that has none.
    """

    entry: Entry
    on_tick: Callable[[], None] = lambda: None
    imports: Sequence[str] = ()

    def run(self, job: Job) -> None:
        """Starts the job's ranks and returns when all have ended well.

        Raises:
            StageError: if a rank failed; names it, its own last line, and its log.
            Interrupted: if the ranks were asked to stop, and did.
        """
        context = multiprocessing.get_context("forkserver")
        more = () if cuda_present() else self.imports
        context.set_forkserver_preload([*PRELOADED, self.entry.__module__, *more])
        _start_fork_server()
        folder = RunFolder(job.run_folder).stage(job.stage)
        forget_failures(folder)
        rendezvous = Path(tempfile.mkdtemp(prefix="llmscale-"))
        processes: list[ForkServerProcess] = []
        with Stops(ask=lambda: _ask(processes), end=lambda: _kill(processes)) as stops:
            try:
                address = f"file://{rendezvous}/store"
                for rank in range(job.task.ranks):
                    arguments = (self.entry, job, rank, address, folder.log_file(rank))
                    processes.append(context.Process(target=_rank_main, args=arguments))
                    processes[-1].start()
                if stops.asked:
                    raise Interrupted(GO_ON)
                self._follow(job, folder, processes, stops)
            except (EOFError, ConnectionError, BrokenPipeError):
                if not stops.asked:
                    raise
                raise Interrupted(GO_ON) from None
            finally:
                _kill(processes)
                shutil.rmtree(rendezvous, ignore_errors=True)

    def _follow(
        self, job: Job, folder: StageFolder, processes: list[ForkServerProcess], stops: Stops
    ) -> None:
        while any(process.exitcode is None for process in processes):
            running = [process.sentinel for process in processes if process.exitcode is None]
            wait(running, POLL_SECONDS)
            self.on_tick()
            if _failed(processes):
                _wait_for_others(processes)
                break
        failed = _failed(processes)
        if stops.asked and (failed or any(p.exitcode for p in processes)):
            raise Interrupted(GO_ON)
        if failed:
            codes = {rank: process.exitcode for rank, process in enumerate(processes)}
            raise StageError(first_cause(job, folder, codes).line)
        if any(process.exitcode for process in processes):
            raise Interrupted("a rank was asked to stop; run the same command again to go on")
        if stops.asked:
            raise Interrupted(GO_ON)


def _failed(processes: list[ForkServerProcess]) -> bool:
    return any(p.exitcode not in (None, 0, Interrupted.exit_code) for p in processes)


def _ask(processes: list[ForkServerProcess]) -> None:
    """Asks the ranks to stop at their step's end."""
    for process in processes:
        if process.pid is not None and process.is_alive():
            process.terminate()


def _start_fork_server() -> None:
    """Starts it deaf to Ctrl-C, which a terminal sends to all: the launcher decides alone."""
    if threading.current_thread() is not threading.main_thread():
        ensure_running()
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def _wait_for_others(processes: list[ForkServerProcess]) -> None:
    """Gives the other ranks a moment to write down errors of their own."""
    deadline = time.monotonic() + SECONDS_FOR_OTHERS_ERRORS
    while time.monotonic() < deadline and any(p.exitcode is None for p in processes):
        wait([p.sentinel for p in processes if p.exitcode is None], POLL_SECONDS)


def _kill(processes: list[ForkServerProcess]) -> None:
    started = [process for process in processes if process.pid is not None]
    for process in started:
        if process.is_alive():
            process.kill()
    for process in started:
        process.join()


def _rank_main(entry: Entry, job: Job, rank: int, rendezvous: str, log_file: Path) -> None:
    """A rank's process, deaf to Ctrl-C and gone when its launcher is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_launcher()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    os.environ["LOCAL_RANK"] = str(rank)
    os._exit(run_as_rank(entry, job, rank, rendezvous, log_file))


def _end_with_launcher() -> None:
    """Ends this rank at once if the launcher dies, however it died."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None, "a rank is a child of its launcher"

    def watch() -> None:
        wait([launcher.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
