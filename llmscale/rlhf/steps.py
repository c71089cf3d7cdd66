"""An update of a model by answers: which of them a rank is dealt, and the step itself."""

from collections.abc import Sequence

import torch

from llmscale.data.samples import rank_places
from llmscale.errors import StageError
from llmscale.rlhf.lesson import Lesson
from llmscale.rlhf.prompts import sampling_key
from llmscale.training.batches import ModelBatch
from llmscale.training.engine import Engine, StepResult
from llmscale.training.schedule import learning_rate


def dealt_answers(lesson: Lesson, engine: Engine, step: int, number: int) -> list[list[list[int]]]:
    """Of each update of a pass, this rank's micro-batches, as numbers of answers.

    Args:
        step: the iteration (0 is the first).
        number: of the pass.
    """
    samples, each = lesson.rollout.samples, lesson.batch.global_
    key = sampling_key(lesson.seed, "order", step, number)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(key)).tolist()
    dealt = (
        rank_places(
            consumed=first,
            global_batch=each,
            micro_batch=lesson.batch.micro,
            data_rank=engine.data_rank,
            data_ranks=engine.data_ranks,
        )
        for first in range(0, samples, each)
    )
    return [[[order[place] for place in micro] for micro in own] for own in dealt]


def learned(lesson: Lesson, engine: Engine, batches: Sequence[ModelBatch], step: int) -> StepResult:
    """One update of an engine; collective.

    Raises:
        StageError: if it was not finite; it was not applied.
    """
    rate = learning_rate(step, lesson.steps, engine.settings)
    result = engine.train_step(batches, rate)
    if not (result.applied or result.overflowed):
        raise StageError(
            f"iteration {step + 1}: loss {result.loss}, gradient norm {result.gradient_norm}: not "
            "finite; the update was not applied"
        )
    return result
