"""What a model makes of an iteration's rows, known to every rank.

Shape legend: n rows, s places a row, b rows of a micro-batch.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from llmscale.rlhf.batches import read_batch, valued_batch
from llmscale.training.batches import ModelBatch
from llmscale.training.engine import Engine
from llmscale.training.loop import own_numbers
from llmscale.training.rows import Rows


def log_probabilities(engine: Engine, rows: Rows, micro_batch: int) -> Tensor:
    """Of the token that follows each place, ``[n, s]``; collective."""
    return -_everywhere(engine, rows, micro_batch, read_batch)


def values(engine: Engine, rows: Rows, micro_batch: int) -> Tensor:
    """A critic's value at each place, ``[n, s]``; collective."""
    return _everywhere(engine, rows, micro_batch, valued_batch)


def _everywhere(
    engine: Engine,
    rows: Rows,
    micro_batch: int,
    batch_of: Callable[[Rows], ModelBatch],
) -> Tensor:
    """One number a place. Ranks that have none, or not these rows, take part and are told.

    What is not a number comes out as infinite, so that it is seen on every rank.
    """
    count, length = rows.tokens_bs.shape
    dealt = own_numbers(count, engine, micro_batch)
    batches = [batch_of(rows.chosen([number % count for number in own])) for own in dealt]
    whole_ns = torch.full((count, length), -math.inf, device=engine.device)
    for own, output in zip(dealt, engine.outputs(batches), strict=False):
        output_bs = output.float().reshape(len(own), length)
        kept = [row for row, number in enumerate(own) if number < count]
        whole_ns[[own[row] for row in kept]] = output_bs[kept].nan_to_num(nan=math.inf)
    dist.all_reduce(whole_ns, op=dist.ReduceOp.MAX)
    return whole_ns
