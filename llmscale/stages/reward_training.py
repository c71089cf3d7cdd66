"""What a reward model learns from, and what is measured of it before and after."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from llmscale.artifacts import StageFolder, read_json, write_json
from llmscale.data.groups import Group, Groups, GroupSamples
from llmscale.errors import RecipeError
from llmscale.evaluation.calibration import calibration
from llmscale.evaluation.reward_models import SCORES_FILE, Normalization, write_normalizations
from llmscale.models.architecture import RewardArchitecture
from llmscale.models.huggingface_config import read_architecture
from llmscale.stages import tuning
from llmscale.stages.base import Workspace
from llmscale.stages.engines import TrainedModel
from llmscale.stages.judgements import Encoded, Encoder, about_groups, group_samples
from llmscale.stages.reward import ABOUT_SCORES, Reward
from llmscale.stages.train_rank import Course
from llmscale.training.data_sets import SampleObjective
from llmscale.training.engine import Engine
from llmscale.training.group_scores import group_scores
from llmscale.training.rewards import Comparisons, Regression
from llmscale.training.rows import RowForm

QUANTILES = ("least", "lower_quartile", "median", "upper_quartile", "greatest")


def groups_of(_stage: Reward, judged: Sequence[Encoded], _encoder: Encoder) -> Iterator[Group]:
    """A group for every judgement."""
    for one in judged:
        yield Group(one.texts, one.judgement.margin, one.judgement.target)


def reward_model(stage: Reward, folder: StageFolder, start_from: Path) -> TrainedModel:
    """The model that a stage trains, once its examples are made."""
    architecture = RewardArchitecture.upon(read_architecture(start_from), stage.heads)
    beside = {SCORES_FILE: folder.path / SCORES_FILE}
    return tuning.tuned_model(stage, folder, start_from, architecture, beside)


def reward_training(stage: Reward, workspace: Workspace) -> Course:
    """What a stage trains."""
    model = workspace.inputs["start_from"]

    def read(name: str, file: Path) -> Groups:
        return Groups(file, stage.head_number(name))

    sources = group_samples(stage, workspace, "train", read)
    held_out = group_samples(stage, workspace, "validation", read)
    form = tuning.row_form(stage, model, about_groups(workspace)["padding"], workspace.device)
    objective = _objective(stage, form, [*sources.values(), *held_out.values()])
    trained = reward_model(stage, workspace.folder, model)
    course = tuning.tuned_course(
        stage, workspace, trained, objective, sources, list(held_out.values())
    )
    measures = ScoreMeasures(
        folder=workspace.folder,
        heads=stage.heads,
        form=form,
        micro_batch=stage.batch.micro,
        reference=_first(sources.values(), stage.normalization_samples),
        held_out=_first(held_out.values(), stage.validation.samples),
    )
    return replace(course, measures=measures)


def _first(sets: Iterable[GroupSamples], most: int) -> list[Group]:
    """The first samples of every data set, at most so many of each."""
    return [one.sample(number) for one in sets for number in range(min(len(one), most))]


def _objective(
    stage: Reward, form: RowForm, samples: Sequence[GroupSamples]
) -> SampleObjective[Group]:
    """Comparisons, or regression where the groups are single texts with scores."""
    groups = [one.sample(number) for one in samples for number in range(len(one))]
    single = {len(group.texts) == 1 for group in groups}
    if len(single) == 2:
        raise RecipeError(
            "data: some records are scores and others are compared; use compare on those with "
            "scores, or a stage for each"
        )
    if single == {False}:
        return Comparisons(form, max(len(group.texts) for group in groups), stage.centering)
    heads = range(len(stage.heads))
    targets = [[group.target for group in groups if group.head == head] for head in heads]
    means = [float(np.mean(own)) if own else 0.0 for own in targets]
    spreads = [float(np.std(own)) or 1.0 if own else 1.0 for own in targets]
    return Regression(form, means, spreads)


@dataclass(frozen=True)
class ScoreMeasures:
    """How scores are distributed before and after training, and how far they can be believed.

    Attributes:
        reference: samples by whose texts scores are normalized.
        held_out: samples that were not trained on.
    """

    folder: StageFolder
    heads: Sequence[str]
    form: RowForm
    micro_batch: int
    reference: Sequence[Group]
    held_out: Sequence[Group]

    def before(self, engine: Engine) -> None:
        """Keeps the distribution of the first weights' scores; collective."""
        scores_tk = self._scores(engine, self.reference)
        if dist.get_rank() == 0:
            write_json(self._file, {"before": self._distribution(scores_tk)})

    def after(self, engine: Engine) -> None:
        """Writes the distribution of the best weights' scores, and what they are worth."""
        scores_tk = self._scores(engine, self.reference)
        held_out_tk = self._scores(engine, self.held_out)
        if dist.get_rank() > 0:
            return
        after = self._distribution(scores_tk)
        preferences = self._preferences(held_out_tk)
        write_json(self._file, {**(read_json(self._file) or {}), "after": after, **preferences})
        normalization = {
            head: Normalization(mean=told["mean"], standard_deviation=told["standard_deviation"])
            for head, told in after.items()
        }
        write_normalizations(self.folder.path / SCORES_FILE, normalization)
        preferences.pop("calibration", None)
        self.folder.add_metrics(**preferences)

    @property
    def _file(self) -> Path:
        return self.folder.path / ABOUT_SCORES

    def _scores(self, engine: Engine, groups: Sequence[Group]) -> np.ndarray:
        return group_scores(engine, groups, self.form, self.micro_batch)

    def _distribution(self, scores_tk: np.ndarray) -> dict[str, dict[str, float]]:
        """Mean, standard deviation and quantiles of each head's scores over the reference texts."""
        heads_t = np.array([group.head for group in self.reference for _ in group.texts])
        told = {}
        for number, head in enumerate(self.heads):
            own = scores_tk[heads_t == number, number]
            own = own if len(own) else scores_tk[:, number]
            quantiles = np.quantile(own, [0, 0.25, 0.5, 0.75, 1]).tolist()
            told[head] = {
                "mean": float(own.mean()),
                "standard_deviation": float(own.std()),
                **dict(zip(QUANTILES, quantiles, strict=True)),
            }
        return told

    def _preferences(self, scores_tk: np.ndarray) -> dict[str, Any]:
        """Accuracy and calibration of the preferences that held-out scores predict."""
        differences, first = [], 0
        for group in self.held_out:
            own = scores_tk[first : first + len(group.texts), group.head]
            differences += [better - worse for better, worse in combinations(own, 2)]
            first += len(group.texts)
        if not differences:
            return {}
        return calibration(np.array(differences))
