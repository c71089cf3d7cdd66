"""Learning from rewards: a policy becomes likelier to answer what is worth more."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmscale.clusters.base import ClusterSettings
from llmscale.clusters.devices import require_engine
from llmscale.errors import RecipeError
from llmscale.models.architecture import Architecture
from llmscale.models.huggingface_config import read_architecture, read_vocabulary
from llmscale.parallel.layout import Layout
from llmscale.rlhf.settings import OF_GROUPS, AlgorithmName, Kl, Rollout, Update
from llmscale.settings import NOT_IDENTITY, Name, Problem, under
from llmscale.stages.base import MODEL_FILES, Link, Named, RecipeView, Workspace
from llmscale.stages.ppo_placement import (
    SPLIT,
    Placement,
    RankGroup,
    Role,
    layouts,
    placement_problems,
)
from llmscale.stages.ppo_settings import Critic, Prompts, RewardSource
from llmscale.stages.reward import Reward
from llmscale.stages.tuned import ABOUT_EXAMPLES, TunedStage, vocabulary_of
from llmscale.training.settings import Zero

SAMPLES = "samples.jsonl"
"""The file in a stage's folder with answers of some iterations, and what they were worth."""
VALIDATION_ANSWERS = "validation.jsonl"
"""That with all answers to held-out prompts."""
SCORES_TEXTS = Link(("reward",), or_folder=True, folder_holds=MODEL_FILES)


class Ppo(TunedStage):
    """``kind: ppo``. Gives ``checkpoints/`` and, of the last one, ``hf/``.

    In each of ``steps`` iterations the policy answers some prompts, the answers are scored, and
    the policy learns from them, ``batch.global`` answers an update. ``algorithm``: ``ppo`` with a
    critic (Schulman et al. 2017); ``grpo`` (Shao et al. 2024) and ``rloo`` (Ahmadian et al. 2024)
    compare the answers to one prompt; ``reinforce`` compares with the mean of all (Williams 1992).
    """

    kind: Literal["ppo"]
    data: dict[Name, Prompts] = Field(min_length=1)
    algorithm: AlgorithmName = "ppo"
    rewards: dict[Name, RewardSource] = Field(min_length=1)
    rollout: Rollout
    kl: Kl = Kl()
    critic: Critic | None = None
    update: Update = Update()
    placement: Annotated[Placement, NOT_IDENTITY] = Field(default={})
    samples_every: Annotated[PositiveInt, NOT_IDENTITY] = 10

    checkpointed: ClassVar[str] = "policy"

    def named(self) -> Iterator[Named]:
        yield from super().named()
        for name, source in self.rewards.items():
            if source.model is not None:
                yield Named(("rewards", name, "model"), source.model, SCORES_TEXTS)
        if self.critic is not None and self.critic.start_from is not None:
            yield Named(("critic", "start_from"), self.critic.start_from, SCORES_TEXTS)

    def problems(self, view: RecipeView) -> Iterator[Problem]:
        yield from super().problems(view)
        if self.epochs is not None:
            yield Problem(("epochs",), "this kind counts iterations; use steps")
        if self.early_stopping is not None:
            yield Problem(("early_stopping",), "there is no validation loss here; remove it")
        if self.batch.ramp is not None:
            yield Problem(("batch", "ramp"), "an iteration's answers are all there; remove it")
        if self.adapter is not None and self.adapter.virtual:
            yield Problem(
                ("adapter", "method"), "answers are sampled without virtual tokens; use lora"
            )
        if all(source.weight == 0 for source in self.rewards.values()):
            yield Problem(("rewards",), "all weights are 0, so that nothing is learned; raise one")
        for name, source in self.rewards.items():
            yield from under("rewards", under(name, source.problems()))
        yield from under("kl", self.kl.problems())
        yield from self._algorithm_problems()
        yield from self._critic_problems(view)

    def _algorithm_problems(self) -> Iterator[Problem]:
        samples, update = self.rollout.samples, self.batch.global_
        if samples % update:
            yield Problem(
                ("batch", "global"),
                f"{update} does not divide the {samples} answers of an iteration "
                f"(rollout.prompts {self.rollout.prompts} x rollout.answers "
                f"{self.rollout.answers}); use {samples}",
            )
        if self.algorithm in OF_GROUPS and self.rollout.answers < 2:
            yield Problem(
                ("rollout", "answers"),
                f"{self.algorithm} compares the answers to one prompt; use 2 or more",
            )
        if self.algorithm != "ppo" and self.critic is not None:
            yield Problem(("critic",), f"{self.algorithm} has none; remove it, or use ppo")
        if self.algorithm != "ppo" and self.update.whiten_rewards:
            yield Problem(
                ("update", "whiten_rewards"),
                f"{self.algorithm} compares whole answers; remove it, or use ppo",
            )

    def _critic_problems(self, view: RecipeView) -> Iterator[Problem]:
        """What keeps a model that scores texts from being a critic of this policy's answers."""
        if self.critic is None or self.critic.start_from is None:
            return
        name, path = self.critic.start_from, ("critic", "start_from")
        stage = view.stages.get(name)
        try:
            own = vocabulary_of(self, view.stages)
            if isinstance(stage, Reward):
                heads, known = len(stage.heads), vocabulary_of(stage, view.stages)
            else:
                heads = len(read_architecture(Path(name)).scored)
                known = read_vocabulary(Path(name))
        except RecipeError as error:
            yield Problem(path, str(error))
            return
        if heads != 1:
            yield Problem(
                path, f"it has {heads} heads, and a critic has one; leave it out for a new one"
            )
        elif known != own:
            yield Problem(
                path,
                f"it knows {known} tokens, the policy {own}; use a model with the policy's "
                "tokenizer, or leave it out",
            )

    def training_problems(
        self, architecture: Architecture, cluster: ClusterSettings, sequence_length: int | None
    ) -> Iterator[Problem]:
        yield from super().training_problems(architecture, cluster, sequence_length)
        length = sequence_length or architecture.sequence_length
        if self.rollout.max_new_tokens >= length:
            yield Problem(
                ("rollout", "max_new_tokens"),
                f"{self.rollout.max_new_tokens} leaves no room for a prompt in {length} tokens; "
                f"use at most {length - 1}",
            )
        if self.parallel.context > 1:
            yield Problem(
                ("parallel", "context"),
                "answers are short, and are not split; remove it, or use tensor or pipeline",
            )
        yield from self._placement_problems(architecture, cluster)

    def _placement_problems(
        self, architecture: Architecture, cluster: ClusterSettings
    ) -> Iterator[Problem]:
        wanted: dict[Role, bool] = {
            "reference": self.kl.wanted,
            "critic": self.algorithm == "ppo",
        }
        yield from under("placement", placement_problems(self.placement, architecture, wanted))
        for (name, group), layout in zip(
            self.placement.items(), self.layouts(cluster.ranks)[1:], strict=True
        ):
            if {*SPLIT} & {*group.roles}:
                there = self.as_group(group)
                for problem in there.engine_problems(architecture, cluster):
                    yield Problem(("placement", name), problem.message)
            if "critic" in group.roles:
                copies, pipeline = layout.data or 1, layout.pipeline
                virtual = layout.virtual_pipeline
                found = self.batch.problems(
                    data_ranks=copies, pipeline=pipeline, virtual_pipeline=virtual
                )
                yield from under("batch", found)
        if self.rollout.ahead and not any(g.roles == ("rollout",) for g in self.placement.values()):
            yield Problem(
                ("rollout", "ahead"),
                "only ranks that do nothing else answer while the policy learns; give rollout a "
                "group of its own in placement, or remove it",
            )
        taken = sum(layout.model_ranks * (layout.data or 1) for layout in self.layouts(1)[1:])
        if self.placement and taken + self.parallel.model_ranks > cluster.ranks:
            yield Problem(
                ("placement",),
                f"its groups have {taken} ranks and the policy at least "
                f"{self.parallel.model_ranks}, but cluster.nodes x cluster.ranks_per_node is "
                f"{cluster.ranks}; use {taken + self.parallel.model_ranks} ranks or more",
            )

    def layouts(self, ranks: int) -> list[Layout]:
        return layouts(self.parallel, self.placement, ranks)

    def as_group(self, group: RankGroup) -> "Ppo":
        """The stage as a group's ranks build its models."""
        engine = group.engine or self.engine
        zero = group.zero or (self.zero if engine == self.engine else Zero())
        distributed = self.optimizer.distributed and engine == "megatron"
        optimizer = self.optimizer.model_copy(update={"distributed": distributed})
        own = {"engine": engine, "zero": zero, "optimizer": optimizer, "parallel": group.parallel}
        return self.model_copy(update=own)

    def require_packages(self) -> None:
        super().require_packages()
        self.rollout.require_package()
        for group in self.placement.values():
            require_engine(group.engine or self.engine)

    def imports(self) -> tuple[str, ...]:
        return (*super().imports(), "llmscale.stages.ppo_training")

    def critic_settings(self) -> Critic:
        """The critic's; those by default where the recipe says nothing."""
        return self.critic or Critic()

    def run(self, task: str, workspace: Workspace) -> None:
        if task == "train":
            from llmscale.stages.ppo_training import learn_from_rewards

            learn_from_rewards(self, workspace)
        elif not (workspace.folder.path / ABOUT_EXAMPLES).exists():
            from llmscale.stages.prompts import make_prompts

            make_prompts(self, workspace)
