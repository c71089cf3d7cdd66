"""A model under several schemes of quantization, side by side."""

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import Field

from llmscale.artifacts import write_json
from llmscale.quantization.schemes import SCHEMES, SchemeName
from llmscale.settings import Problem
from llmscale.stages.base import RecipeView, Workspace
from llmscale.stages.quantize import QuantizedStage, Texts

COMPARISON = "comparison.json"


class Compare(QuantizedStage):
    """``kind: compare``. Gives ``comparison.json``: size, quality and speed of each scheme."""

    kind: Literal["compare"]
    schemes: tuple[SchemeName, ...] = Field(min_length=1)
    measured_on: Texts
    window: int | None = Field(default=None, ge=2)

    def texts(self) -> Mapping[str, Texts]:
        return {"measured_on": self.measured_on, **super().texts()}

    def problems(self, view: RecipeView) -> Iterator[Problem]:
        for number, name in enumerate(self.schemes):
            calibrated = name if SCHEMES[name].calibrated else None
            yield from self.calibration_problems(("schemes", str(number)), calibrated)
        yield from super().problems(view)
        if len(set(self.schemes)) < len(self.schemes):
            yield Problem(("schemes",), "one is named twice; name each once")

    def run(self, task: str, workspace: Workspace) -> None:
        from llmscale.quantization.compare import compare

        corpus, calibration = workspace.inputs.get("corpus"), self.calibration
        rows = compare(
            workspace.inputs["model"],
            self.schemes,
            self.measured_on.texts(corpus),
            lambda: calibration.texts(corpus) if calibration else iter(()),
            tokens=calibration.tokens if calibration else 0,
            window=self.window,
            on_step=lambda done, total: workspace.progress.update(done, total, "models"),
        )
        write_json(workspace.folder.path / COMPARISON, rows)
        shown = ("megabytes", "perplexity", "agreement", "divergence", "decode_tokens_per_second")
        workspace.folder.add_metrics(
            **{row["scheme"]: {key: row[key] for key in shown} for row in rows}
        )
