"""How far a stage is, in a small file that any follower on any machine can read."""

import time
from pathlib import Path

from llmscale.artifacts import read_json, write_json

SECONDS_BETWEEN_WRITES = 0.2


class Progress:
    """Writes ``progress.json``: done, total, unit and a line of text."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._written = 0.0

    def update(self, done: float, total: float, unit: str, text: str = "") -> None:
        """Says how far the work is; most calls cost nothing."""
        if done < total and time.monotonic() - self._written < SECONDS_BETWEEN_WRITES:
            return
        self._written = time.monotonic()
        write_json(self._file, {"done": done, "total": total, "unit": unit, "text": text})


def read_progress(file: Path) -> dict[str, float | str] | None:
    """What the newest ``update`` said."""
    return read_json(file)
