"""Answers as batches of a policy and of a critic, with their losses.

Shape legend: b answers, s places a row, n answers of an iteration.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from llmscale.rlhf.policy_losses import (
    Estimator,
    clipped_policy_loss,
    disagreement,
    divergence,
    entropy_loss,
    value_loss,
)
from llmscale.training.batches import LossSum, TokenBatch, WholeTextBatch
from llmscale.training.rows import Rows


@dataclass(frozen=True)
class PolicyObjective:
    """What a policy minimizes.

    Attributes:
        clip, dual_clip: of PPO's loss.
        kl_weight: of the divergence from the reference, where it is a part of the loss; else 0.
        kl_estimator: how that is estimated.
        entropy_weight: of the policy's entropy, which is to be large.
    """

    clip: float
    dual_clip: float | None
    kl_weight: float
    kl_estimator: Estimator
    entropy_weight: float = 0.0


@dataclass(frozen=True)
class Experience:
    """What an iteration's answers are, and what is known of them: all that an update needs.

    ``sampled_ns`` are the policy's log-probabilities when it answered, None where its update is to
    see them; ``rollout_ns`` are what the rollout had for them, ``reference_ns`` the reference's.
    ``weights_ns`` are of tokens that an earlier policy answered.
    """

    rows: Rows
    sampled_ns: Tensor | None
    rollout_ns: Tensor
    advantages_ns: Tensor
    reference_ns: Tensor | None = None
    weights_ns: Tensor | None = None

    @property
    def mask_ns(self) -> Tensor:
        """Which places' tokens are answers."""
        return self.rows.mask_bs > 0

    def policy_batch(self, numbers: Sequence[int], objective: PolicyObjective) -> "PolicyBatch":
        """Some answers, for the policy to learn from."""
        own = list(numbers)
        rows = self.rows.chosen(own)
        return PolicyBatch(
            tokens_bs=rows.tokens_bs,
            positions_bs=rows.positions_bs,
            labels_bs=rows.labels_bs,
            mask_bs=rows.mask_bs,
            sampled_bs=None if self.sampled_ns is None else self.sampled_ns[own],
            rollout_bs=self.rollout_ns[own],
            advantages_bs=self.advantages_ns[own],
            reference_bs=None if self.reference_ns is None else self.reference_ns[own],
            weights_bs=None if self.weights_ns is None else self.weights_ns[own],
            objective=objective,
        )


@dataclass(frozen=True)
class Expected:
    """What a critic expected of answers, and what it should have: all that it learns from."""

    rows: Rows
    values_ns: Tensor
    returns_ns: Tensor

    def to(self, device: torch.device) -> "Expected":
        """The same on another device."""
        rows = self.rows.to(device)
        return Expected(rows, self.values_ns.to(device), self.returns_ns.to(device))

    def batch(self, numbers: Sequence[int], clip: float | None) -> "ValueBatch":
        """Some answers."""
        own = list(numbers)
        rows = self.rows.chosen(own)
        return ValueBatch(
            tokens_bs=rows.tokens_bs,
            positions_bs=rows.positions_bs,
            mask_bs=rows.mask_bs,
            values_bs=self.values_ns[own],
            returns_bs=self.returns_ns[own],
            clip=clip,
        )


@dataclass(frozen=True, kw_only=True)
class AnsweredBatch(WholeTextBatch):
    """Texts of which ``mask_bs`` says which places' tokens are answers."""

    mask_bs: Tensor

    @property
    def count(self) -> Tensor:
        return self.mask_bs.sum().to(torch.int)

    def counting(self, counts: Tensor) -> Self:
        return replace(self, mask_bs=self.mask_bs * counts[:, None])

    def _summed(self, loss_bs: Tensor, told: Sequence[Tensor]) -> LossSum:
        counted_bs = self.mask_bs > 0
        total, *figures = (torch.where(counted_bs, each, 0.0).sum() for each in (loss_bs, *told))
        return LossSum(total, self.count, torch.stack(figures).detach())


@dataclass(frozen=True, kw_only=True)
class PolicyBatch(AnsweredBatch):
    """Answers, and how much better each token was than expected.

    Where ``sampled_bs`` is None, the policy has not learned since it answered: no ratio is other
    than 1, but it has a gradient. Then what the policy makes of its answers is told, too.
    """

    labels_bs: Tensor
    sampled_bs: Tensor | None
    rollout_bs: Tensor
    advantages_bs: Tensor
    reference_bs: Tensor | None
    weights_bs: Tensor | None
    objective: PolicyObjective

    @property
    def figures(self) -> tuple[str, ...]:
        seen = () if self.sampled_bs is not None else ("entropy", "rollout_disagreement")
        return "clip_fraction", "update_kl", *seen

    def loss(self, outputs: Tensor) -> LossSum:
        own, counted_bs = self.objective, self.mask_bs > 0
        log_probabilities_bs = -outputs.float()
        known_bs = log_probabilities_bs.detach()
        sampled_bs = known_bs if self.sampled_bs is None else self.sampled_bs
        log_ratio_bs = torch.where(counted_bs, log_probabilities_bs - sampled_bs, 0.0)
        loss_bs = clipped_policy_loss(log_ratio_bs, self.advantages_bs, own.clip, own.dual_clip)
        if self.weights_bs is not None:
            loss_bs = loss_bs * self.weights_bs
        if own.entropy_weight:
            loss_bs = loss_bs + own.entropy_weight * entropy_loss(
                log_probabilities_bs, log_ratio_bs
            )
        if own.kl_weight:
            assert self.reference_bs is not None, "a divergence in the loss has a reference"
            apart_bs = torch.where(counted_bs, log_probabilities_bs - self.reference_bs, 0.0)
            loss_bs = loss_bs + own.kl_weight * divergence(apart_bs, own.kl_estimator)
        moved_bs = log_ratio_bs.detach()
        clipped_bs = ((moved_bs.exp() - 1).abs() > own.clip).float()
        told = [clipped_bs, divergence(-moved_bs, "k3")]
        if self.sampled_bs is None:
            told += [-known_bs, disagreement(self.rollout_bs, known_bs)]
        return self._summed(loss_bs, told)


@dataclass(frozen=True, kw_only=True)
class ValueBatch(AnsweredBatch):
    """Answers, and what a critic should have expected at each place."""

    values_bs: Tensor
    returns_bs: Tensor
    clip: float | None

    labels_bs: ClassVar[None] = None
    figures: ClassVar[tuple[str, ...]] = ("value_clip_fraction",)

    def loss(self, outputs: Tensor) -> LossSum:
        value_bs = outputs[..., 0].float()
        loss_bs = value_loss(value_bs, self.values_bs, self.returns_bs, self.clip)
        moved_bs = (value_bs.detach() - self.values_bs).abs()
        clipped_bs = (moved_bs > (self.clip or torch.inf)).float()
        return self._summed(loss_bs, [clipped_bs])


@dataclass(frozen=True, kw_only=True)
class ScoredBatch(AnsweredBatch):
    """Texts of which a critic's value at every place is wanted."""

    labels_bs: ClassVar[None] = None
    figures: ClassVar[tuple[str, ...]] = ()

    def loss(self, outputs: Tensor) -> LossSum:
        """The sum of the values, which nobody minimizes."""
        value_bs = torch.where(self.mask_bs > 0, outputs[..., 0].float(), 0.0)
        return LossSum(value_bs.sum(), self.count, torch.zeros(0, dtype=torch.float64))


def read_batch(rows: Rows) -> TokenBatch:
    """Rows to look at: of a policy, the loss of every token is wanted."""
    return TokenBatch(
        tokens_bs=rows.tokens_bs,
        positions_bs=rows.positions_bs,
        labels_bs=rows.labels_bs,
        mask_bs=rows.mask_bs,
    )


def valued_batch(rows: Rows) -> ScoredBatch:
    """Rows whose values are wanted."""
    return ScoredBatch(
        tokens_bs=rows.tokens_bs, positions_bs=rows.positions_bs, mask_bs=rows.mask_bs
    )
