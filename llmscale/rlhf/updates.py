"""How policy and critic learn from an iteration's answers: in passes of updates."""

from llmscale.rlhf.batches import Expected, Experience, PolicyObjective
from llmscale.rlhf.lesson import Lesson
from llmscale.rlhf.roles import Roles
from llmscale.rlhf.steps import dealt_answers, learned
from llmscale.training.schedule import learning_rate


def updated(
    lesson: Lesson,
    roles: Roles,
    experience: Experience,
    expected: Expected | None,
    coefficient: float,
    step: int,
) -> dict[str, float]:
    """Learns from answers; what is told of the last update; collective.

    Args:
        expected: what the critic learns from, if there is one.
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
    limit = lesson.update.target_kl
    told: dict[str, float] = {}
    for number in range(lesson.update.passes):
        if limit is not None and told.get("update_kl", 0.0) > limit:
            break
        if roles.critic is not None and expected is not None:
            roles.critic.begin(expected, step, number)
        told |= _policy_pass(lesson, roles, experience, objective, step, number)
        if roles.critic is not None and expected is not None:
            told |= roles.critic.finish()
        told["passes"] = number + 1
    told["learning_rate"] = learning_rate(step, lesson.steps, roles.policy.settings)
    return told


def _policy_pass(
    lesson: Lesson,
    roles: Roles,
    experience: Experience,
    objective: PolicyObjective,
    step: int,
    number: int,
) -> dict[str, float]:
    told: dict[str, float] = {}
    for dealt in dealt_answers(lesson, roles.policy, step, number):
        batches = [experience.policy_batch(own, objective) for own in dealt]
        result = learned(lesson, roles.policy, batches, step)
        told = {"loss": result.loss, "gradient_norm": result.gradient_norm, **result.figures}
    return told
