"""What the models say of an iteration's answers, and what that makes them worth.

Shape legend: n answers, s places a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmscale.errors import StageError
from llmscale.rlhf.advantages import masked_mean
from llmscale.rlhf.algorithms import ESTIMATORS, Judged, Weighing
from llmscale.rlhf.answers import Answer, answer_rows, rollout_probabilities
from llmscale.rlhf.batches import Expected, Experience
from llmscale.rlhf.lesson import Lesson
from llmscale.rlhf.metrics import answer_figures, explained_variance
from llmscale.rlhf.passes import log_probabilities
from llmscale.rlhf.policy_losses import disagreement, divergence
from llmscale.rlhf.roles import Roles
from llmscale.rlhf.scoring import Scores
from llmscale.training.rows import RowForm, Rows


@dataclass(frozen=True)
class Said:
    """What the models say at each place, ``[n, s]``; None of one that is not there or not asked."""

    policy_ns: Tensor | None
    reference_ns: Tensor | None
    critic_ns: Tensor | None


def examined(
    lesson: Lesson,
    roles: Roles,
    form: RowForm,
    answers: Sequence[Answer],
    scores: Scores,
    coefficient: float,
    early: bool = False,
) -> tuple[Experience, Expected | None, dict[str, float]]:
    """What there is to learn from answers, for policy and critic, and what is told of them.

    Collective.

    Args:
        coefficient: of the divergence from the reference.
        early: whether the policy has learned since it began to answer.

    Raises:
        StageError: if a model's outputs are not finite.
    """
    rows = answer_rows(answers, form, roles.policy.device)
    mask_ns, rollout_ns = rows.mask_bs > 0, rollout_probabilities(answers, rows)
    said = _asked(lesson, roles, rows, policy=early or not lesson.seen_in_update)
    apart_ns = _apart(said, rollout_ns, mask_ns)
    penalties_ns = torch.zeros_like(rollout_ns)
    if apart_ns is not None and lesson.kl.place == "reward":
        penalties_ns = coefficient * divergence(apart_ns, lesson.kl.estimator)
    scores_n = torch.tensor(scores.total_n, device=rollout_ns.device)
    judged = Judged(scores_n, penalties_ns, mask_ns, said.critic_ns)
    estimates = ESTIMATORS[lesson.algorithm](judged, _weighing(lesson))
    experience = Experience(
        rows=rows,
        sampled_ns=said.policy_ns,
        rollout_ns=rollout_ns,
        advantages_ns=estimates.advantages_ns,
        reference_ns=said.reference_ns,
        weights_ns=_weights(said, rollout_ns, mask_ns, lesson) if early else None,
    )
    figures = answer_figures(answers, scores) | _policy_figures(experience)
    if apart_ns is not None:
        figures |= {"kl": float(apart_ns.sum(1).mean()), "kl_coefficient": coefficient}
    expected = None
    if said.critic_ns is not None and estimates.returns_ns is not None:
        expected = Expected(rows, said.critic_ns, estimates.returns_ns)
        told = explained_variance(said.critic_ns, estimates.returns_ns, mask_ns)
        figures["explained_variance"] = told
    return experience, expected, figures


def _asked(lesson: Lesson, roles: Roles, rows: Rows, policy: bool) -> Said:
    """What the models say; of the policy only if it is wanted now."""
    micro_batch, reference, critic = lesson.batch.micro, roles.reference, roles.critic
    said = Said(
        policy_ns=log_probabilities(roles.policy, rows, micro_batch) if policy else None,
        reference_ns=reference.log_probabilities(rows, micro_batch) if reference else None,
        critic_ns=critic.values(rows) if critic else None,
    )
    for name, known_ns in vars(said).items():
        if known_ns is not None and not bool(known_ns[rows.mask_bs > 0].isfinite().all()):
            who = name.removesuffix("_ns")
            raise StageError(f"the {who}'s outputs are not finite; nothing was learned from them")
    return said


def _apart(said: Said, rollout_ns: Tensor, mask_ns: Tensor) -> Tensor | None:
    """By how much the policy's log-probabilities are above the reference's; 0 where masked.

    A policy that was not asked is the rollout's: its answers are samples of that one.
    """
    if said.reference_ns is None:
        return None
    policy_ns = rollout_ns if said.policy_ns is None else said.policy_ns
    return torch.where(mask_ns, policy_ns - said.reference_ns, 0.0)


def _policy_figures(experience: Experience) -> dict[str, float]:
    """What is known of the policy; nothing where its update is to see it."""
    own, mask_ns = experience, experience.mask_ns
    told = {}
    if own.sampled_ns is not None:
        differing_ns = disagreement(own.rollout_ns, own.sampled_ns)
        told["entropy"] = float(masked_mean(-own.sampled_ns, mask_ns))
        told["rollout_disagreement"] = float(masked_mean(differing_ns, mask_ns))
    if own.weights_ns is not None:
        told["importance_weight"] = float(masked_mean(own.weights_ns, mask_ns))
    return told


def _weights(said: Said, rollout_ns: Tensor, mask_ns: Tensor, lesson: Lesson) -> Tensor:
    """How much likelier the policy's tokens are than when they were sampled, up to a cap."""
    assert said.policy_ns is not None, "it was asked"
    ratio_ns = torch.where(mask_ns, said.policy_ns - rollout_ns, 0.0).exp()
    return ratio_ns.clamp(max=lesson.rollout.weight_cap)


def _weighing(lesson: Lesson) -> Weighing:
    return Weighing(
        answers=lesson.rollout.answers,
        discount=lesson.expectation.discount,
        smoothing=lesson.expectation.smoothing,
        whiten_rewards=lesson.update.whiten_rewards,
    )
