"""Preference training without a reward model: a model becomes likelier to say what people chose."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from pydantic import Field, PositiveFloat

from llmscale.clusters.base import ClusterSettings, Task
from llmscale.data.judgements import FormName
from llmscale.settings import Name, Problem
from llmscale.stages.base import RecipeView, Workspace
from llmscale.stages.judged import JudgedData, JudgedStage
from llmscale.stages.tuned import ABOUT_EXAMPLES


class Dpo(JudgedStage):
    """``kind: dpo``. Gives ``checkpoints/`` and, of the best one, ``hf/``.

    ``sigmoid`` is DPO's own loss (Rafailov et al. 2023), ``ipo`` that of Azar et al. (2023), both
    over pairs; ``kto`` (Ethayarajh et al. 2024) learns from single answers with a label, too, whose
    losses the two weights weigh. The reference is the model to start from: its probabilities are
    computed once and ``kept``, or at every step ``alongside``, which holds it in memory.
    """

    kind: Literal["dpo"]
    data: dict[Name, JudgedData] = Field(min_length=1)
    loss: Literal["sigmoid", "ipo", "kto"] = "sigmoid"
    beta: PositiveFloat = 0.1
    reference: Literal["kept", "alongside"] = "kept"
    desirable_weight: PositiveFloat = 1.0
    undesirable_weight: PositiveFloat = 1.0

    def problems(self, view: RecipeView) -> Iterator[Problem]:
        yield from super().problems(view)
        for weight in ("desirable_weight", "undesirable_weight"):
            if self.loss != "kto" and getattr(self, weight) != 1:
                yield Problem((weight,), "only loss kto weighs answers; remove it")

    def tasks(self, cluster: ClusterSettings) -> tuple[Task, ...]:
        examples, train = super().tasks(cluster)
        if self.reference == "alongside":
            return examples, train
        return examples, replace(train, name="reference"), train

    def run(self, task: str, workspace: Workspace) -> None:
        from llmscale.stages.dpo_training import groups_of, keep_references, preference_training
        from llmscale.stages.judgements import make_groups
        from llmscale.stages.train_rank import train

        if task == "train":
            train(self, workspace, preference_training(self, workspace))
        elif task == "reference":
            keep_references(self, workspace)
        elif not (workspace.folder.path / ABOUT_EXAMPLES).exists():
            compared: tuple[FormName, ...] = ("pairs", "rankings")
            forms = (*compared, "labels") if self.loss == "kto" else compared
            make_groups(self, workspace, forms, groups_of)
