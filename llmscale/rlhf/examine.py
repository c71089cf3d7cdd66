"""What the models say of an iteration's answers, and what that makes them worth.

Shape legend: n answers, s places a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmscale.errors import StageError
from llmscale.rlhf.advantages import masked_mean
from llmscale.rlhf.algorithms import ESTIMATORS, Judged, Weighing
from llmscale.rlhf.answers import Answer, answer_rows, rollout_probabilities
from llmscale.rlhf.batches import Experience
from llmscale.rlhf.lesson import Lesson
from llmscale.rlhf.metrics import answer_figures, disagreement, explained_variance
from llmscale.rlhf.passes import log_probabilities, values
from llmscale.rlhf.policy_losses import divergence
from llmscale.rlhf.roles import Roles
from llmscale.rlhf.scoring import Scores
from llmscale.training.rows import RowForm, Rows


def examined(
    lesson: Lesson,
    roles: Roles,
    form: RowForm,
    answers: Sequence[Answer],
    scores: Scores,
    coefficient: float,
    early: bool = False,
) -> tuple[Experience, dict[str, float]]:
    """What there is to learn from answers, and what is told of them; collective.

    Args:
        coefficient: of the divergence from the reference.
        early: whether the policy has learned since it began to answer.

    Raises:
        StageError: if a model's outputs are not finite.
    """
    rows = answer_rows(answers, form, roles.policy.device)
    mask_ns, rollout_ns = rows.mask_bs > 0, rollout_probabilities(answers, rows)
    sampled_ns, reference_ns, values_ns = _asked(roles, rows, lesson.batch.micro)
    apart_ns = _apart(sampled_ns, reference_ns, mask_ns)
    penalties_ns = torch.zeros_like(sampled_ns)
    if lesson.kl.place == "reward":
        penalties_ns = coefficient * divergence(apart_ns, lesson.kl.estimator)
    scores_n = torch.tensor(scores.total_n, device=sampled_ns.device)
    judged = Judged(scores_n, penalties_ns, mask_ns, values_ns)
    estimates = ESTIMATORS[lesson.algorithm](judged, _weighing(lesson))
    experience = Experience(
        rows=rows,
        sampled_ns=sampled_ns,
        advantages_ns=estimates.advantages_ns,
        reference_ns=reference_ns,
        values_ns=values_ns,
        returns_ns=estimates.returns_ns,
        weights_ns=_weights(sampled_ns, rollout_ns, mask_ns, lesson) if early else None,
    )
    figures = answer_figures(answers, scores) | {
        "entropy": float(masked_mean(-sampled_ns, mask_ns)),
        "rollout_disagreement": disagreement(rollout_ns, sampled_ns, mask_ns),
    }
    if experience.weights_ns is not None:
        figures["importance_weight"] = float(masked_mean(experience.weights_ns, mask_ns))
    if reference_ns is not None:
        figures |= {"kl": float(apart_ns.sum(1).mean()), "kl_coefficient": coefficient}
    if values_ns is not None and estimates.returns_ns is not None:
        told = explained_variance(values_ns, estimates.returns_ns, mask_ns)
        figures["explained_variance"] = told
    return experience, figures


def _asked(
    roles: Roles, rows: Rows, micro_batch: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What policy, reference and critic say at each place, ``[n, s]`` each."""
    sampled_ns = log_probabilities(roles.policy, rows, micro_batch)
    reference_ns = values_ns = None
    if roles.reference is not None:
        reference_ns = roles.reference.log_probabilities(rows, micro_batch)
    if roles.critic is not None:
        values_ns = values(roles.critic, rows, micro_batch)
    said = {"policy": sampled_ns, "reference": reference_ns, "critic": values_ns}
    for name, known_ns in said.items():
        if known_ns is not None and not bool(known_ns[rows.mask_bs > 0].isfinite().all()):
            raise StageError(f"the {name}'s outputs are not finite; nothing was learned from them")
    return sampled_ns, reference_ns, values_ns


def _apart(sampled_ns: Tensor, reference_ns: Tensor | None, mask_ns: Tensor) -> Tensor:
    """By how much the policy's log-probabilities are above the reference's; 0 where masked."""
    if reference_ns is None:
        return torch.zeros_like(sampled_ns)
    return torch.where(mask_ns, sampled_ns - reference_ns, 0.0)


def _weights(sampled_ns: Tensor, rollout_ns: Tensor, mask_ns: Tensor, lesson: Lesson) -> Tensor:
    """How much likelier the policy's tokens are than when they were sampled, up to a cap."""
    ratio_ns = torch.where(mask_ns, sampled_ns - rollout_ns, 0.0).exp()
    return ratio_ns.clamp(max=lesson.rollout.weight_cap)


def _weighing(lesson: Lesson) -> Weighing:
    return Weighing(
        answers=lesson.rollout.answers,
        discount=lesson.expectation.discount,
        smoothing=lesson.expectation.smoothing,
        whiten_rewards=lesson.update.whiten_rewards,
    )
