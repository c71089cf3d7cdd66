"""How much better an answer, or a token of it, was than expected: pure functions.

Shape legend: n answers, s places a row, g prompts, k answers to each. A place of a row is the
state before a token: its value, reward and advantage are about the token that follows it.
"""

import torch
from torch import Tensor

GROUP_EPSILON = 1e-4
WHITENING_EPSILON = 1e-8


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean where the mask is true; what is masked may be NaN."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def whitened(values: Tensor, mask: Tensor, keep_mean: bool = False) -> Tensor:
    """Values with a variance of 1 and, unless it is kept, a mean of 0; 0 where masked.

    The variance is the biased one ("The N Implementation Details of RLHF with PPO", 2023, 3).
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    white = (values - mean) * torch.rsqrt(variance + WHITENING_EPSILON)
    return torch.where(mask, white + mean if keep_mean else white, 0.0)


def last_places(mask_ns: Tensor) -> Tensor:
    """The last true place of each row, ``[n]``."""
    places_s = torch.arange(mask_ns.shape[1], device=mask_ns.device)
    return torch.where(mask_ns, places_s, -1).amax(1)


def token_rewards(scores_n: Tensor, penalties_ns: Tensor, mask_ns: Tensor) -> Tensor:
    """Rewards ``[n, s]``: every token's penalty taken off, the answer's score at its last token."""
    rewards_ns = torch.where(mask_ns, -penalties_ns, 0.0)
    rows_n = torch.arange(len(scores_n), device=scores_n.device)
    rewards_ns[rows_n, last_places(mask_ns)] += scores_n
    return rewards_ns


def generalized_advantages(
    rewards_ns: Tensor, values_ns: Tensor, mask_ns: Tensor, discount: float, smoothing: float
) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16); 0 where masked.

    After an answer's last token nothing is to be gained; masked places carry on what is behind
    them.
    """
    advantages_ns = torch.zeros_like(values_ns)
    following_n = torch.zeros_like(values_ns[:, 0])
    carried_n = torch.zeros_like(following_n)
    for place in reversed(range(values_ns.shape[1])):
        counts_n = mask_ns[:, place]
        change_n = rewards_ns[:, place] + discount * following_n - values_ns[:, place]
        carried_n = torch.where(counts_n, change_n + discount * smoothing * carried_n, carried_n)
        following_n = torch.where(counts_n, values_ns[:, place], following_n)
        advantages_ns[:, place] = torch.where(counts_n, carried_n, 0.0)
    return advantages_ns


def group_relative(returns_n: Tensor, answers: int) -> Tensor:
    """GRPO's advantages ``[n]`` (Shao et al. 2024, section 4.1.2): in deviations of the group.

    Args:
        returns_n: of the answers to one prompt after the other.
        answers: how many each prompt has; at least two.
    """
    returns_gk = returns_n.view(-1, answers)
    centred_gk = returns_gk - returns_gk.mean(1, keepdim=True)
    return (centred_gk / (returns_gk.std(1, keepdim=True) + GROUP_EPSILON)).flatten()


def leave_one_out(returns_n: Tensor, answers: int) -> Tensor:
    """RLOO's advantages ``[n]`` (Ahmadian et al. 2024, eq. 8): above the mean of the others."""
    returns_gk = returns_n.view(-1, answers)
    others_gk = (returns_gk.sum(1, keepdim=True) - returns_gk) / (answers - 1)
    return (returns_gk - others_gk).flatten()


def centred(returns_n: Tensor, answers: int) -> Tensor:
    """REINFORCE's advantages ``[n]``: above the mean of all answers (Williams 1992)."""
    return returns_n - returns_n.mean()
