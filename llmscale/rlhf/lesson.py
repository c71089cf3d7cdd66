"""How a policy learns: the parts of a recipe that say so."""

from dataclasses import dataclass

from llmscale.rlhf.settings import AlgorithmName, Expectation, Kl, Rollout, Update
from llmscale.training.settings import Batch, Checkpointing


@dataclass(frozen=True)
class Lesson:
    """What an iteration is.

    Attributes:
        steps: iterations.
        batch: answers an update, and in one pass of one rank.
        samples_every: iterations between those whose answers are kept.
    """

    algorithm: AlgorithmName
    steps: int
    seed: int
    batch: Batch
    rollout: Rollout
    kl: Kl
    expectation: Expectation
    update: Update
    checkpointing: Checkpointing
    samples_every: int

    @property
    def seen_in_update(self) -> bool:
        """Whether an update's own pass sees what the policy made of its answers.

        It does where it is an iteration's only one.
        """
        return self.update.passes == 1 and self.batch.global_ == self.rollout.samples
