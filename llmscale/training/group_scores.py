"""What a model makes of texts outside of training: their scores, or their answers' probabilities.

Shape legend: t texts, k heads, s tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from torch import Tensor

from llmscale.data.chat import Example
from llmscale.data.groups import Group
from llmscale.training.batches import ModelBatch
from llmscale.training.engine import Engine
from llmscale.training.loop import own_numbers
from llmscale.training.preferences import answer_batch
from llmscale.training.rewards import Regression
from llmscale.training.rows import RowForm

PASSES = 8
"""Micro-batches a rank that are padded to one length."""
Batch = TypeVar("Batch", bound=ModelBatch)


def group_scores(
    engine: Engine, groups: Sequence[Group], form: RowForm, micro_batch: int
) -> np.ndarray:
    """The scores of all texts ``[t, k]``, one group after another; collective."""
    texts = [text for group in groups for text in group.texts]
    unjudged = Regression(form, mean=(0.0,), spread=(1.0,))
    return _values(
        engine,
        texts,
        form,
        micro_batch,
        make=lambda own, length: unjudged.batch(
            [Group((text,), target=0.0) for text in own], length, engine.device
        ),
        value=lambda batch, outputs: batch.scores(outputs),
    )


def answer_probabilities(
    engine: Engine, texts: Sequence[Example], form: RowForm, micro_batch: int
) -> np.ndarray:
    """The log-probability of each text's answer ``[t]``; collective."""
    return _values(
        engine,
        texts,
        form,
        micro_batch,
        make=lambda own, length: answer_batch(form, own, length, engine.device),
        value=lambda batch, outputs: batch.log_probabilities(outputs),
    )


def _values(
    engine: Engine,
    texts: Sequence[Example],
    form: RowForm,
    micro_batch: int,
    make: Callable[[Sequence[Example], int], Batch],
    value: Callable[[Batch, Tensor], Tensor],
) -> np.ndarray:
    found: dict[int, np.ndarray] = {}
    passes = PASSES * engine.passes_multiple
    at_a_time = micro_batch * engine.data_ranks * passes
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    for first in range(0, len(texts), at_a_time):
        places = order[first : first + at_a_time]
        part = [texts[place] for place in places]
        length = form.length(max(map(len, part)))
        numbers = own_numbers(len(part), engine, micro_batch)
        batches = [make([part[min(n, len(part) - 1)] for n in own], length) for own in numbers]
        for own, batch, outputs in zip(numbers, batches, engine.outputs(batches), strict=False):
            values = value(batch, outputs).double().cpu().numpy()
            found |= {places[n]: one for n, one in zip(own, values, strict=True) if n < len(part)}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    whole = {number: one for part in everyone for number, one in part.items()}
    return np.array([whole[number] for number in range(len(texts))])
