"""The learning rate as a function of the step: nothing to store, nothing to resume."""

import math

from llmscale.training.settings import Optimizer


def learning_rate(step: int, steps: int, settings: Optimizer) -> float:
    """The learning rate of step ``step`` (0 is the first) of ``steps``.

    Linear warm-up to the peak, then: ``constant``; ``linear`` or ``cosine`` (Loshchilov and
    Hutter 2017, equation 5) towards the minimum, which step ``steps`` would have; ``wsd``
    stays at the peak and falls linearly over the last ``decay_steps`` (Hu et al. 2024,
    section 4).
    """
    peak, lowest, warmup = (
        settings.learning_rate,
        settings.minimum_learning_rate,
        settings.warmup_steps,
    )
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.schedule == "constant":
        return peak
    start = warmup
    if settings.schedule == "wsd":
        start = steps - (settings.decay_steps or max(1, (steps - warmup) // 10))
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    if settings.schedule == "cosine":
        return lowest + (peak - lowest) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak - (peak - lowest) * progress
