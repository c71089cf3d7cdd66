"""What stages that learn from people's judgements have in common."""

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from llmscale.clusters.base import ClusterSettings
from llmscale.models.architecture import Architecture
from llmscale.settings import Name, Problem, Settings
from llmscale.stages.base import RecipeView
from llmscale.stages.tuned import DataFiles, TunedStage


class Compare(Settings):
    """Pairs out of scored responses to one prompt, or without any.

    Each response is put beside ``pairs_each`` others, whose scores differ by ``difference`` at
    least; which ones, the seed decides. Responses are split before they are paired.
    """

    difference: PositiveFloat
    pairs_each: PositiveInt = 1


class JudgedData(DataFiles):
    """Files of judgements: pairs, rankings, scores or labels.

    ``score_range`` is the least and the greatest score there can be.
    """

    score_range: Annotated[tuple[float, ...], Field(min_length=2, max_length=2)] | None = None
    compare: Compare | None = None

    def problems(self) -> Iterator[Problem]:
        """What is wrong beyond types."""
        if self.score_range is not None and self.score_range[0] >= self.score_range[1]:
            low, high = self.score_range
            yield Problem(("score_range",), f"{low} is not below {high}; give the least one first")


class JudgedStage(TunedStage):
    """A stage that learns from texts people have judged."""

    data: Mapping[Name, JudgedData]

    def problems(self, view: RecipeView) -> Iterator[Problem]:
        yield from super().problems(view)
        for name, one in self.data.items():
            for problem in one.problems():
                yield Problem(("data", name, *problem.path), problem.message)

    def training_problems(
        self, architecture: Architecture, cluster: ClusterSettings, sequence_length: int | None
    ) -> Iterator[Problem]:
        yield from super().training_problems(architecture, cluster, sequence_length)
        if self.parallel.context > 1:
            yield Problem(
                ("parallel", "context"),
                "judged texts are short, and are not split; remove it, or use tensor or pipeline",
            )
