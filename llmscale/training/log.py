"""What rank 0 tells of training: ``metrics.jsonl``, TensorBoard and the progress file."""

import json
import math
import time
from collections.abc import Mapping
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter

from llmscale.artifacts import StageFolder, write_text
from llmscale.progress import Progress

SMOOTHING = 0.9


class TrainingLog:
    """Appends a line a step; on a resume, lines past the resumed step are taken out."""

    def __init__(
        self,
        folder: StageFolder,
        progress: Progress,
        *,
        steps: int,
        resumed_step: int,
        peak_flops: float | None,
    ) -> None:
        self._progress = progress
        self._steps = steps
        self._peak_flops = peak_flops
        kept = [m for m in folder.metrics() if m["step"] <= resumed_step] if resumed_step else []
        write_text(folder.metrics_file, "".join(json.dumps(m) + "\n" for m in kept))
        self._file: TextIO = folder.metrics_file.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(folder.tensorboard), purge_step=resumed_step + 1)
        self._seconds = 0.0
        self._begun = time.perf_counter()

    def step(
        self, step: int, tokens: int, total_tokens: int, flops: float, **values: float
    ) -> None:
        """Logs one training step of ``tokens`` tokens and ``flops`` model FLOP."""
        now = time.perf_counter()
        elapsed, self._begun = now - self._begun, now
        rate = tokens / elapsed
        line: dict[str, Any] = {
            "step": step,
            **values,
            "tokens": total_tokens,
            "step_seconds": round(elapsed, 4),
            "tokens_per_second": round(rate, 1),
        }
        if self._peak_flops and flops:
            line["mfu"] = round(flops / elapsed / self._peak_flops, 4)
        self._write(line)
        self._seconds = (
            elapsed
            if not self._seconds
            else (SMOOTHING * self._seconds + (1 - SMOOTHING) * elapsed)
        )
        shown = "reward" if "reward" in values else "loss"
        text = f"{shown} {values[shown]:.4f}  {tokens / self._seconds:,.0f} tokens/s"
        self._progress.update(step, self._steps, "steps", text)

    def validation(self, step: int, loss: float, figures: Mapping[str, float]) -> None:
        """Logs a validation loss, and keeps its time out of the next step's."""
        self.measured(step, validation_loss=loss, **_validation(figures))

    def measured(self, step: int, **values: float) -> None:
        """Logs what was measured after a step, and keeps its time out of the next step's."""
        self._write({"step": step, **values})
        self._begun = time.perf_counter()

    def paused(self) -> None:
        """Says that what went before (a checkpoint) is no part of the next step's time."""
        self._begun = time.perf_counter()

    def close(self) -> None:
        """Flushes all files."""
        self._file.close()
        self._tensorboard.close()

    def _write(self, line: dict[str, Any]) -> None:
        finite = {n: v if math.isfinite(v) else None for n, v in line.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        for name, value in line.items():
            if name not in ("step", "tokens"):
                self._tensorboard.add_scalar(name, value, line["step"])


def _validation(figures: Mapping[str, float]) -> dict[str, float]:
    return {f"validation_{name}": value for name, value in figures.items()}
