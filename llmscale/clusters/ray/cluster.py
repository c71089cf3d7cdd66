"""Ranks as actors of a Ray cluster."""

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup

from llmscale.artifacts import RunFolder, StageFolder
from llmscale.clusters.base import Job
from llmscale.clusters.failures import Failure, first_cause, forget_failures, recorded
from llmscale.clusters.history import (
    FINISHED,
    End,
    History,
    Start,
    progress_mark,
    start_until_done,
)
from llmscale.clusters.ray.connection import first_line
from llmscale.clusters.ray.rank_actor import SIGNAL_TO_SAVE
from llmscale.clusters.ray.reservation import Reservations
from llmscale.clusters.ray.seats import (
    POLL_SECONDS,
    Seat,
    granted,
    lost_nodes,
    seated,
    told_placement,
)
from llmscale.clusters.ray.settings import RaySettings
from llmscale.clusters.stops import Stops
from llmscale.errors import Interrupted, LlmscaleError, StageError
from llmscale.mirror import told_files
from llmscale.parallel.exchange import CORES_VARIABLE, LAUNCHER_VARIABLE, RANK_VARIABLE, exchange

SECONDS_FOR_OTHERS_ERRORS = 3.0
SECONDS_BETWEEN_LOOKS = 5.0
KILLED = -int(signal.SIGKILL)
TOKENIZER_THREADS_VARIABLE = "RAYON_NUM_THREADS"
"""How many threads the package tokenizers uses."""
CODES_OF_THE_ASKED = {0, Interrupted.exit_code, -int(SIGNAL_TO_SAVE)}


@dataclass
class _Ranks:
    """How the ranks of one start are.

    Attributes:
        codes: their exit codes, in the order of their ends.
        outgrown: whether they were asked to stop, since more may run.
    """

    seats: Sequence[Seat]
    codes: dict[int, int | None] = field(default_factory=dict)
    outgrown: bool = False

    @property
    def failed(self) -> bool:
        """Whether a rank ended badly, other than by being asked to."""
        return any(code for code in self.codes.values())

    @property
    def silent(self) -> list[Seat]:
        """The seats of ranks that have not ended."""
        return [seat for seat in self.seats if seat.rank not in self.codes]


@dataclass
class RayCluster:
    """Runs a job's ranks on the Ray cluster that this process is connected to.

    Attributes:
        job: Ray's id of the job that this process is.
        device: the recipe's; ``auto`` is a GPU each, if the cluster has any.
        code: the copy of the package that ranks run; None for the installed one.
        stops: what this process was asked meanwhile.
        on_tick: called some times a second while ranks run.
        say: told, in a line, where ranks are and what went wrong and is mended.
    """

    job: str
    settings: RaySettings
    device: str
    code: Path | None
    stops: Stops
    on_tick: Callable[[], None]
    say: Callable[[str], None]
    starts: int = 0

    def run(self, job: Job) -> None:
        """Starts the job's ranks, again after a failure that may pass; returns when all are done.

        Raises:
            StageError: if a rank failed for certain, or too often without progress.
            MachineError: if the cluster does not come to have what the ranks need.
            Interrupted: if the ranks were asked to stop, and did.
        """
        folder = RunFolder(job.run_folder).stage(job.stage)

        def prepare() -> Start:
            nodes = tuple(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
            return Start(self.job, job.stage, job.task.name, progress_mark(folder), nodes)

        start_until_done(
            History(job.run_folder),
            self.settings.restarts,
            prepare=prepare,
            run=lambda _start: self._run_once(job, folder),
            say=self.say,
        )

    def _run_once(self, job: Job, folder: StageFolder) -> End:
        """Waits for the resources and runs the ranks to their end, whatever that is."""
        self.starts += 1
        reservations = Reservations(self.settings, self.device, self.stops, self.on_tick, self.say)
        with ExitStack() as stack:
            reservation = stack.enter_context(reservations.reserved(job))
            if reservation is None:
                return End("asked to stop", stopped=True)
            group, ranks = reservation
            task = replace(job.task, ranks=ranks)
            forget_failures(folder)
            try:
                seats = stack.enter_context(seated(group, job.stage, task, self.starts))
            except (ConnectionError, RayError) as error:
                return _failed(f"{job.stage} ({task.name}): {first_line(error)}")
            if ranks > 1:
                self.say(told_placement(seats, task.neighbours))
            room = None
            if ranks < job.task.ranks:
                self.say(f"{job.stage}: going on with {ranks} of {job.task.ranks} ranks")
                room = stack.enter_context(reservations.asked_for(job, job.task.ranks - ranks))
            return self._run_seated(replace(job, task=task), folder, seats, room)

    def _run_seated(
        self, job: Job, folder: StageFolder, seats: Sequence[Seat], room: PlacementGroup | None
    ) -> End:
        """Runs the ranks.

        Args:
            room: resources that are asked for, with which more ranks could run.
        """
        own = ray.util.get_node_ip_address()
        here = all(seat.node == own for seat in seats)
        with exchange("127.0.0.1" if here else own) as meeting:
            environments = [self._environment(seat, meeting.variable()) for seat in seats]
            if (end := self._fetch(job, seats)) is not None:
                return end
            starts = {
                seat.actor.start.remote(job.to_json(), environment): seat
                for seat, environment in zip(seats, environments, strict=True)
            }
            if (end := self._not_started(job, starts)) is not None:
                return end
            ranks = self._follow(seats, room)
            unsent = self._send(job, ranks)
        end = self._end(job, folder, ranks)
        return end if unsent is None or end.line != FINISHED else unsent

    def _fetch(self, job: Job, seats: Sequence[Seat]) -> End | None:
        """Brings a run that is at a URL to each node; what kept it from that, if anything did."""
        if job.url is None:
            return None
        RunFolder(job.run_folder).push("code", job.stage)
        firsts = [seat for seat in seats if seat.local_rank == 0]
        return self._not_started(job, {s.actor.fetch.remote(job.to_json()): s for s in firsts})

    def _send(self, job: Job, ranks: _Ranks) -> End | None:
        """Gets what the nodes wrote to the URL, and what is told of it to this folder.

        Where all ranks did well, so must every node here: else what it wrote would be missed.

        Returns:
            what kept nodes from it, if anything did.
        """
        if job.url is None:
            return None
        firsts = [seat for seat in ranks.seats if seat.local_rank == 0]
        gone = lost_nodes(firsts) if ranks.failed or ranks.silent else []
        sent = {seat.actor.send.remote(): seat for seat in firsts if seat.node not in gone}
        unsent = None
        for reference, seat in sent.items():
            try:
                ray.get(reference)
            except RayError as error:
                unsent = _failed(f"{job.stage}: node {seat.node} did not send: {_line(error)}")
        RunFolder(job.run_folder).pull(*told_files(job.stage))
        return unsent

    def _not_started(self, job: Job, starts: Mapping[ray.ObjectRef, Seat]) -> End | None:
        """What kept ranks from being started, waited for; None if all are."""
        where = f"{job.stage} ({job.task.name})"
        waiting, looked = list(starts), time.monotonic()
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)
            self.on_tick()
            if self.stops.asked:
                return End("asked to stop", stopped=True)
            if waiting and time.monotonic() - looked > SECONDS_BETWEEN_LOOKS:
                looked = time.monotonic()
                if lost := lost_nodes(starts[reference] for reference in waiting):
                    return _failed(f"{where}: node {', '.join(lost)} failed")
        for reference, seat in starts.items():
            try:
                ray.get(reference)
            except RayTaskError as error:
                if isinstance(error.cause, LlmscaleError):
                    raise StageError(f"{where}: node {seat.node}: {error.cause}") from None
                if isinstance(error.cause, FileNotFoundError):
                    raise StageError(
                        f"{where}: {error.cause}; keep the run folder (--run-dir, LLMSCALE_RUNS) "
                        "on storage that all nodes share"
                    ) from None
                return _failed(f"{where}: rank {seat.rank} did not start: {error.cause}")
            except RayError as error:
                return _failed(f"{where}: rank {seat.rank} did not start: {first_line(error)}")
        return None

    def _environment(self, seat: Seat, launcher: str) -> dict[str, str]:
        """What a rank finds in its environment."""
        code = {} if self.code is None else {"PYTHONPATH": str(self.code), "PYTHONSAFEPATH": "1"}
        return {
            LAUNCHER_VARIABLE: launcher,
            RANK_VARIABLE: str(seat.rank),
            CORES_VARIABLE: str(self.settings.cpus_per_rank),
            TOKENIZER_THREADS_VARIABLE: str(self.settings.cpus_per_rank),
            "LOCAL_RANK": str(seat.local_rank),
            "LOCAL_WORLD_SIZE": str(seat.local_ranks),
            **code,
        }

    def _follow(self, seats: Sequence[Seat], room: PlacementGroup | None) -> _Ranks:
        """Waits until all ranks have ended, or one has failed; asks them to where more may run."""
        ranks = _Ranks(seats)
        waiting = {seat.actor.wait.remote(): seat for seat in seats}
        asked = 0
        failed_at: float | None = None
        while waiting:
            done, _ = ray.wait(list(waiting), timeout=POLL_SECONDS)
            for reference in done:
                seat = waiting.pop(reference)
                ranks.codes[seat.rank] = _exit_code(reference)
            self.on_tick()
            if len(self.stops.asked) > asked:
                asked = len(self.stops.asked)
                if asked > 1:
                    break
                for seat in ranks.silent:
                    seat.actor.ask.remote()
            if room is not None and not ranks.outgrown and granted(room):
                ranks.outgrown = True
                for seat in ranks.silent:
                    seat.actor.ask.remote()
            if ranks.failed:
                failed_at = failed_at or time.monotonic()
                if time.monotonic() - failed_at > SECONDS_FOR_OTHERS_ERRORS:
                    break
        return ranks

    def _end(self, job: Job, folder: StageFolder, ranks: _Ranks) -> End:
        """What came of the ranks."""
        stopped = (recorded(folder, 0) or {}).get("kind") == "stopped"
        if not ranks.failed and not ranks.silent and not stopped:
            return End(FINISHED)
        if ranks.outgrown and set(ranks.codes.values()) <= CODES_OF_THE_ASKED:
            return End("stopped, as there is room for more ranks", again=True)
        if self.stops.asked or (stopped and not ranks.failed):
            return End("asked to stop", stopped=True)
        killed = [seat for seat in ranks.seats if ranks.codes.get(seat.rank) == KILLED]
        lost = lost_nodes([*killed, *ranks.silent])
        failure = first_cause(job, folder, ranks.codes)
        if lost and not failure.certain:
            return _failed(f"{job.stage} ({job.task.name}): node {', '.join(lost)} failed")
        return End(failure.line, failure=failure)


def _failed(line: str) -> End:
    """An end that may be got over by starting again."""
    return End(line, failure=Failure(line, rank=0))


def _line(error: RayError) -> str:
    return str(error.cause) if isinstance(error, RayTaskError) else first_line(error)


def _exit_code(reference: ray.ObjectRef) -> int:
    """The exit code of a rank; that of SIGKILL if its actor died."""
    try:
        return int(ray.get(reference))
    except RayError:
        return KILLED
