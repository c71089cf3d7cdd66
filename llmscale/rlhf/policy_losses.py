"""Losses of tokens, and estimates of a divergence: pure functions.

Any shape is fine; what is masked is left to the caller, who sums by ``where``.
"""

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def clipped_policy_loss(
    log_ratio: Tensor, advantage: Tensor, clip: float, dual_clip: float | None = None
) -> Tensor:
    """PPO's loss of tokens (Schulman et al. 2017, eq. 7).

    Args:
        log_ratio: of a token's probability to that when it was sampled.
        dual_clip: where the advantage is negative, the loss is at most so many times its size
            (Ye et al. 2020, eq. 5); above 1.
    """
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    if dual_clip is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -advantage * dual_clip), loss)


def value_loss(value: Tensor, sampled: Tensor, wanted: Tensor, clip: float | None) -> Tensor:
    """Half the squared error of values, which count as moved by ``clip`` at most if that is worse.

    Args:
        sampled: the values when the answers were sampled.
    """
    error = (value - wanted) ** 2
    if clip is not None:
        near = sampled + (value - sampled).clamp(-clip, clip)
        error = torch.maximum(error, (near - wanted) ** 2)
    return 0.5 * error


def divergence(log_ratio: Tensor, estimator: Estimator) -> Tensor:
    """An estimate of KL(policy, reference) from tokens of the policy (Schulman 2020).

    Args:
        log_ratio: log of the policy's probability over the reference's.
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    return torch.expm1(-log_ratio) + log_ratio


def disagreement(rollout: Tensor, policy: Tensor) -> Tensor:
    """By what share the rollout's probabilities differ from the policy's own, of log ones."""
    return torch.expm1(rollout - policy).abs()


def entropy_loss(log_probability: Tensor, log_ratio: Tensor) -> Tensor:
    """A loss of sampled tokens whose gradient, in the mean, is that of the negative entropy.

    The gradient of sum p log p is that of the mean of log p times log p held fast (Williams
    1992); tokens that an earlier policy sampled are weighed by the ratio of probabilities.

    Args:
        log_ratio: of a token's probability to that when it was sampled.
    """
    return (log_ratio.exp() * log_probability).detach() * log_probability


def adapted_coefficient(
    coefficient: float, kl: float, target: float, answers: int, horizon: int
) -> float:
    """The KL coefficient after so many answers (Ziegler et al. 2019, section 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * answers / horizon)
