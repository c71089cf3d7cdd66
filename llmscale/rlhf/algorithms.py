"""The algorithms by name: where advantages come from. All share one loop and one loss.

Shape legend: n answers, s places a row (see advantages.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from llmscale.rlhf.advantages import (
    centred,
    generalized_advantages,
    group_relative,
    leave_one_out,
    token_rewards,
    whitened,
)


@dataclass(frozen=True)
class Judged:
    """What is known of an iteration's answers before a policy learns from them.

    Attributes:
        scores_n: what each answer is worth.
        penalties_ns: what is taken off each token's reward.
        mask_ns: the places whose tokens are answers.
        values_ns: what a critic expected at each place; None without one.
    """

    scores_n: Tensor
    penalties_ns: Tensor
    mask_ns: Tensor
    values_ns: Tensor | None


@dataclass(frozen=True)
class Estimates:
    """What each token was worth above expectation, and what a critic should have expected."""

    advantages_ns: Tensor
    returns_ns: Tensor | None = None


@dataclass(frozen=True)
class Weighing:
    """How advantages are made of rewards.

    Attributes:
        answers: to each prompt, one behind the other.
        discount, smoothing: gamma and lambda of generalized advantage estimation.
        whiten_rewards: whether rewards are brought to a variance of 1, keeping their mean.
    """

    answers: int
    discount: float
    smoothing: float
    whiten_rewards: bool


def with_critic(judged: Judged, weighing: Weighing) -> Estimates:
    """PPO's: by generalized advantage estimation, whitened over all tokens."""
    assert judged.values_ns is not None, "a critic said what it expects"
    rewards_ns = token_rewards(judged.scores_n, judged.penalties_ns, judged.mask_ns)
    if weighing.whiten_rewards:
        rewards_ns = whitened(rewards_ns, judged.mask_ns, keep_mean=True)
    gained_ns = generalized_advantages(
        rewards_ns, judged.values_ns, judged.mask_ns, weighing.discount, weighing.smoothing
    )
    return Estimates(whitened(gained_ns, judged.mask_ns), gained_ns + judged.values_ns)


def _of_whole_answers(baseline: Callable[[Tensor, int], Tensor]) -> "Estimator":
    def estimates(judged: Judged, weighing: Weighing) -> Estimates:
        mask_ns = judged.mask_ns
        rewards_ns = token_rewards(judged.scores_n, judged.penalties_ns, mask_ns)
        advantages_n = baseline(rewards_ns.sum(1), weighing.answers)
        return Estimates(advantages_n[:, None] * mask_ns)

    return estimates


Estimator = Callable[[Judged, Weighing], Estimates]

ESTIMATORS: Mapping[str, Estimator] = {
    "ppo": with_critic,
    "grpo": _of_whole_answers(group_relative),
    "rloo": _of_whole_answers(leave_one_out),
    "reinforce": _of_whole_answers(centred),
}
