"""What happened to a run's jobs: each start and how it ended, which limits restarts."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmscale.artifacts import RunFolder, StageFolder, now
from llmscale.clusters.failures import Failure
from llmscale.errors import Interrupted, MachineError, StageError
from llmscale.stored import stored_checkpoints

FAILURES_OF_A_BAD_NODE = 2
FINISHED = "finished"


@dataclass(frozen=True)
class Start:
    """One start of a task's ranks within a job.

    Attributes:
        job: SLURM's or Ray's id of the job.
        mark: how far the stage was, as a checkpoint's name.
        nodes: those of the step; on Ray, all that are there.
    """

    job: str
    stage: str
    task: str
    mark: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class End:
    """How a start of a job's ranks ended.

    Attributes:
        line: that, in words.
        blamed: the nodes it is laid to.
        failure: what went wrong, unless the ranks did their work or were asked to stop.
        stopped: whether they were asked to stop.
        again: whether they were, to start again at once.
    """

    line: str
    blamed: Sequence[str] = ()
    failure: Failure | None = None
    stopped: bool = False
    again: bool = False


class History:
    """``RUN_DIR/history.jsonl``: written by one launcher at a time, read by anybody."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = RunFolder(run_folder)
        self.file = run_folder / "history.jsonl"

    def entries(self) -> list[dict[str, Any]]:
        """All that happened, in order; a line that was cut off is left out."""
        if not self.file.exists():
            return []
        found = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    def _add(self, **entry: Any) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as lines:
            if self._cut_off():
                lines.write("\n")
            lines.write(json.dumps({"time": now(), **entry}) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
        self._folder.push(self.file.name)

    def _cut_off(self) -> bool:
        """Whether the last line is a part of one, as a power cut may leave it."""
        return self.file.read_bytes()[-1:] not in (b"", b"\n")

    def begin(self, start: Start) -> None:
        """Notes a start."""
        self._add(event="start", **asdict(start))

    def end(self, job: str, outcome: str, blamed: Iterable[str] = ()) -> None:
        """Notes how the last start ended, and the nodes it is laid to."""
        self._add(event="end", job=job, outcome=outcome, blamed=list(blamed))

    def close_lost_start(
        self, job: str, gone: Callable[[Sequence[str]], Mapping[str, str]]
    ) -> str | None:
        """Notes the end of a start of this job that nobody noted, and which nodes are gone.

        Args:
            gone: tells which of some nodes are out of order, and their states.

        Returns:
            what was noted; None if no start was left open.
        """
        entries = [entry for entry in self.entries() if entry["job"] == job]
        if not entries or entries[-1]["event"] != "start":
            return None
        try:
            lost = gone(entries[-1]["nodes"])
        except MachineError:
            lost = {}
        cause = ", ".join(f"{node} is {state}" for node, state in lost.items())
        outcome = f"the job ended without a word{': ' if cause else ''}{cause}; SLURM requeued it"
        self.end(job, outcome, lost)
        return outcome

    def starts_without_progress(self, start: Start) -> int:
        """How many starts of this job's same task, in a row, began where this one begins."""
        count = 0
        for entry in reversed(self.entries()):
            if entry["job"] != start.job or entry["event"] != "start":
                continue
            same = (entry["stage"], entry["task"], entry["mark"])
            if same != (start.stage, start.task, start.mark):
                break
            count += 1
        return count

    def mishaps(self) -> list[dict[str, Any]]:
        """The ends of starts that did not finish, in order."""
        return [e for e in self.entries() if e["event"] == "end" and e["outcome"] != FINISHED]

    def bad_nodes(self) -> list[str]:
        """Nodes that failures were laid to more than once."""
        blamed = Counter(node for entry in self.entries() for node in entry.get("blamed", []))
        return sorted(node for node, times in blamed.items() if times >= FAILURES_OF_A_BAD_NODE)


def progress_mark(folder: StageFolder) -> str:
    """The newest checkpoint of a stage, by name; empty before the first."""
    stored = stored_checkpoints(folder.path)
    if stored is not None:
        return f"step-{steps[-1]:08d}" if (steps := stored.steps()) else ""
    if not folder.checkpoints.is_dir():
        return ""
    return max((path.name for path in folder.checkpoints.glob("step-*")), default="")


def start_until_done(
    history: History,
    restarts: int,
    *,
    prepare: Callable[[], Start],
    run: Callable[[Start], End],
    say: Callable[[str], None],
) -> None:
    """Starts a task's ranks, again after each failure that may pass, until they are done.

    Args:
        restarts: how often in a row they are started again without a new checkpoint.
        prepare: makes ready for a start, and says which it is.
        run: runs the ranks to their end.
        say: told, in a line, what went wrong and is mended.

    Raises:
        StageError: if a rank failed for certain, or too often without progress.
        Interrupted: if the ranks were asked to stop, and did.
    """
    while True:
        start = prepare()
        _require_progress(history, start, restarts + 1)
        history.begin(start)
        try:
            end = run(start)
        except BaseException as error:
            with suppress(OSError):  # on a full disk, the error itself matters more
                history.end(start.job, str(error) or type(error).__name__)
            raise
        history.end(start.job, end.line, end.blamed)
        if end.stopped:
            raise Interrupted(end.line)
        if end.failure is None and not end.again:
            return
        if end.failure is not None and end.failure.certain:
            raise StageError(end.line)
        say(f"{end.line}; starting again")


def _require_progress(history: History, start: Start, most: int) -> None:
    if history.starts_without_progress(start) >= most:
        last = [e["outcome"] for e in history.entries() if e["event"] == "end"][-1]
        since = f" since {start.mark}" if start.mark else ""
        raise StageError(
            f"{start.stage} ({start.task}): no progress{since} in {most} starts, so it is not "
            f"started again; the last one: {last}"
        )
