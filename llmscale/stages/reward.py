"""Training a reward model: it scores texts as people judged them."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from llmscale.settings import Name, Problem, choices
from llmscale.stages.base import RecipeView, Workspace
from llmscale.stages.judged import JudgedData, JudgedStage
from llmscale.stages.tuned import ABOUT_EXAMPLES

ABOUT_SCORES = "scores.json"
"""The file in a stage's folder that says how its scores are distributed."""


class RewardData(JudgedData):
    """Files of pairs, rankings or scores; ``head`` is what they judge, by default the first."""

    head: Name | None = None


class Reward(JudgedStage):
    """``kind: reward``. Gives ``checkpoints/`` and, of the best one, ``hf/``.

    From pairs and rankings the Bradley-Terry loss, with the pairs' margins and, by
    ``centering``, a pull to a mean score of 0; from scores, squared errors. The model has a head
    for each of ``heads``. Afterwards scores are normalized, to a mean of 0 and a variance of 1
    over the first ``normalization_samples`` training samples of each data set; the model's
    folder says how.
    """

    kind: Literal["reward"]
    data: dict[Name, RewardData] = Field(min_length=1)
    heads: Annotated[tuple[Name, ...], Field(min_length=1)] = ("reward",)
    centering: NonNegativeFloat = 0.0
    normalization_samples: PositiveInt = 128

    def problems(self, view: RecipeView) -> Iterator[Problem]:
        yield from super().problems(view)
        if self.adapter is not None:
            yield Problem(
                ("adapter",), "a reward model's head is new, so that it is trained whole; remove it"
            )
        if len(set(self.heads)) < len(self.heads):
            yield Problem(("heads",), "two have one name; name each once")
        for name, one in self.data.items():
            if one.head is not None and one.head not in self.heads:
                yield Problem(
                    ("data", name, "head"), f"{one.head!r} is no head; use {choices(self.heads)}"
                )

    def head_number(self, name: str) -> int:
        """The number of the head that a data set is about."""
        head = self.data[name].head
        return 0 if head is None else self.heads.index(head)

    def run(self, task: str, workspace: Workspace) -> None:
        from llmscale.stages.judgements import make_groups
        from llmscale.stages.reward_training import groups_of, reward_training
        from llmscale.stages.train_rank import train

        if task == "train":
            train(self, workspace, reward_training(self, workspace))
        elif not (workspace.folder.path / ABOUT_EXAMPLES).exists():
            make_groups(self, workspace, ("pairs", "rankings", "scores"), groups_of)
