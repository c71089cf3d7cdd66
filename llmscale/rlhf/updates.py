"""How policy and critic learn from an iteration's answers: in passes of updates."""

from collections.abc import Sequence

import torch

from llmscale.data.samples import rank_places
from llmscale.errors import StageError
from llmscale.rlhf.batches import Experience, PolicyObjective
from llmscale.rlhf.lesson import Lesson
from llmscale.rlhf.prompts import sampling_key
from llmscale.rlhf.roles import Roles
from llmscale.training.batches import ModelBatch
from llmscale.training.engine import Engine, StepResult
from llmscale.training.schedule import learning_rate


def updated(
    lesson: Lesson, roles: Roles, experience: Experience, coefficient: float, step: int
) -> dict[str, float]:
    """Learns from answers; what is told of the last update; collective.

    Args:
        coefficient: of the divergence from the reference.
        step: the iteration (0 is the first).

    Raises:
        StageError: at the first update that is not finite, which is not applied: what follows
            would learn of a policy that is not the one that answered.
    """
    objective = PolicyObjective(
        clip=lesson.update.clip,
        dual_clip=lesson.update.dual_clip,
        kl_weight=coefficient if lesson.kl.place == "loss" else 0.0,
        kl_estimator=lesson.kl.estimator,
        entropy_weight=lesson.update.entropy,
    )
    clip, limit = lesson.expectation.clip, lesson.update.target_kl
    told: dict[str, float] = {}
    for number in range(lesson.update.passes):
        if limit is not None and told.get("update_kl", 0.0) > limit:
            break
        for dealt in _dealt(lesson, roles.policy, step, number):
            batches = [experience.policy_batch(own, objective) for own in dealt]
            result = _step(lesson, roles.policy, batches, step)
            told |= {"loss": result.loss, "gradient_norm": result.gradient_norm, **result.figures}
            if roles.critic is not None:
                valued = [experience.value_batch(own, clip) for own in dealt]
                expected = _step(lesson, roles.critic, valued, step)
                told |= {"value_loss": expected.loss, **expected.figures}
        told["passes"] = number + 1
    told["learning_rate"] = learning_rate(step, lesson.steps, roles.policy.settings)
    return told


def _dealt(lesson: Lesson, policy: Engine, step: int, number: int) -> list[list[list[int]]]:
    """Of each update of a pass, this rank's micro-batches, as numbers of answers."""
    samples, each = lesson.rollout.samples, lesson.batch.global_
    key = sampling_key(lesson.seed, "order", step, number)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(key)).tolist()
    dealt = (
        rank_places(
            consumed=first,
            global_batch=each,
            micro_batch=lesson.batch.micro,
            data_rank=policy.data_rank,
            data_ranks=policy.data_ranks,
        )
        for first in range(0, samples, each)
    )
    return [[[order[place] for place in micro] for micro in own] for own in dealt]


def _step(lesson: Lesson, engine: Engine, batches: Sequence[ModelBatch], step: int) -> StepResult:
    rate = learning_rate(step, lesson.steps, engine.settings)
    result = engine.train_step(batches, rate)
    if not (result.applied or result.overflowed):
        raise StageError(
            f"iteration {step + 1}: loss {result.loss}, gradient norm {result.gradient_norm}: not "
            "finite; the update was not applied"
        )
    return result
