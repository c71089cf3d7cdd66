"""How a run looks to a person: a progress bar on a terminal, lines elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from llmscale.artifacts import RunFolder
from llmscale.progress import read_progress

SECONDS_BETWEEN_LINES = 10.0


class ConsoleDisplay:
    """Shows the stages of a run, and the progress file of the one that runs."""

    def __init__(self, console: Console, folder: RunFolder) -> None:
        self._console = console
        self._folder = folder
        self._stage = ""
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._line_at = 0.0
        self._begun = 0.0

    def stage_skipped(self, name: str) -> None:
        self._console.print(f"{name}: finished before", markup=False)

    def stage_started(self, name: str, task: str, ranks: int) -> None:
        self.stop()
        self._stage = name
        self._begun = self._line_at = time.monotonic()
        where = f"{ranks} ranks" if ranks > 1 else "1 rank"
        self._console.print(f"{name}: {task} on {where}", markup=False)
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("  {task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=None, text="")
            self._bar.start()

    def stage_finished(self, name: str, metrics: dict[str, Any]) -> None:
        self.stop()
        took = f" in {time.monotonic() - self._begun:.0f} s" if self._stage == name else ""
        figures = ", ".join(f"{k} {_shown(v)}" for k, v in metrics.items() if _plain(v))
        self._stage = ""
        self._console.print(f"{name}: done{took}  {figures}", markup=False)

    def note(self, line: str) -> None:
        self._console.print(line, markup=False)

    def tick(self) -> None:
        """Looks at the progress file; cheap enough for some times a second."""
        try:
            progress = read_progress(self._folder.stage(self._stage).progress_file)
        except (OSError, ValueError):
            return  # on NFS, a file that is just being replaced
        if progress is None:
            return
        if self._bar is not None:
            self._bar.update(
                self._task,
                description=str(progress["unit"]),
                completed=float(progress["done"]),
                total=float(progress["total"]),
                text=str(progress["text"]),
            )
        elif time.monotonic() - self._line_at >= SECONDS_BETWEEN_LINES:
            self._line_at = time.monotonic()
            done = f"{progress['done']}/{progress['total']} {progress['unit']}"
            self._console.print(f"  {done}  {progress['text']}", markup=False)

    def stop(self) -> None:
        """Takes the progress bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _plain(value: object) -> bool:
    return isinstance(value, int | float | str)


def _shown(value: object) -> str:
    return (
        f"{value:.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )
