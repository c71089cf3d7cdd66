"""Pipeline schedules, simulated event by event: 1F1B and its interleaved form."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

STEADY_ROUNDS = 3
"""So many times the number of stages, micro-batches are simulated; further ones each take as long
as the busiest stage, which by then all others wait for."""


UNKNOWN = -1.0


@dataclass(frozen=True)
class Chunk:
    """A model chunk's seconds for one micro-batch."""

    forward: float
    backward: float


class Event(NamedTuple):
    """A forward or backward pass of one micro-batch through one chunk."""

    forward: bool
    chunk: int
    micro_batch: int


def pipeline_seconds(
    chunks: Sequence[Chunk], stages: int, micro_batches: int, send_seconds: float
) -> float:
    """From the first forward pass to the end of the last backward pass.

    Args:
        chunks: in the model's order; chunk ``c`` is on stage ``c % stages``.
        send_seconds: of a message between stages. In the interleaved schedule it runs beside
            the computation; without it a stage waits while it sends (Narayanan et al. 2021,
            sections 2.2 and 4.1).
    """
    virtual = len(chunks) // stages
    if stages == 1:
        return micro_batches * sum(chunk.forward + chunk.backward for chunk in chunks)
    simulated = min(micro_batches, STEADY_ROUNDS * stages)
    if virtual > 1:  # in whole rounds, without which stages would wait for each other for ever
        simulated = -(-simulated // stages) * stages
    blocking = send_seconds if virtual == 1 else 0.0
    ends = {
        forward: [[UNKNOWN] * simulated for _ in chunks] for forward in (True, False)
    }  # by direction, chunk and micro-batch
    orders = [list(stage_order(stage, stages, virtual, simulated)) for stage in range(stages)]
    clock = [0.0] * stages
    while any(orders):
        before = sum(map(len, orders))
        for stage, order in enumerate(orders):
            done = 0
            for event in order:
                ready = _ready(event, ends, send_seconds)
                if ready == UNKNOWN:
                    break
                chunk = chunks[event.chunk]
                seconds = chunk.forward if event.forward else chunk.backward
                end = max(clock[stage], ready) + seconds
                ends[event.forward][event.chunk][event.micro_batch] = end
                clock[stage] = end + blocking
                done += 1
            del order[:done]
        assert sum(map(len, orders)) < before, "the schedule's order cannot be kept"
    left = max(0, micro_batches - simulated)
    return max(clock) + left * busiest(chunks, stages, blocking)


def pipeline_estimate(
    chunks: Sequence[Chunk], stages: int, micro_batches: int, send_seconds: float
) -> float:
    """The closed form of ``pipeline_seconds``, for many layouts at a time.

    The busiest stage's work, and one micro-batch's way through the other stages' first chunks
    (Narayanan et al. 2021, section 2.2: ``(p - 1) / (v m)`` of the work).
    """
    virtual = len(chunks) // stages
    blocking = send_seconds if virtual == 1 else 0.0
    steady = micro_batches * busiest(chunks, stages, blocking)
    work = sum(chunk.forward + chunk.backward for chunk in chunks) / len(chunks)
    return steady + (stages - 1) * (work + 2 * send_seconds)


def busiest(chunks: Sequence[Chunk], stages: int, blocking: float = 0.0) -> float:
    """Seconds that the busiest stage computes for one micro-batch."""
    per_stage = (
        sum(chunk.forward + chunk.backward + 2 * blocking for chunk in chunks[stage::stages])
        for stage in range(stages)
    )
    return max(per_stage)


@lru_cache(maxsize=1024)
def stage_order(stage: int, stages: int, virtual: int, micro_batches: int) -> tuple[Event, ...]:
    """What a stage does, in order, by megatron-core's ``schedules.py``.

    Interleaved, micro-batches go through a stage's chunks in rounds of ``stages``. Before
    one forward and one backward pass alternate, ``stages - stage - 1`` forward passes run
    (interleaved: twice as many, and ``virtual - 1`` rounds).
    """
    rounds = [
        range(first, min(first + stages, micro_batches))
        for first in range(0, micro_batches, stages)
    ]
    forward = [
        Event(True, chunk * stages + stage, micro_batch)
        for each in rounds
        for chunk in range(virtual)
        for micro_batch in each
    ]
    backward = [
        Event(False, chunk * stages + stage, micro_batch)
        for each in rounds
        for chunk in reversed(range(virtual))
        for micro_batch in each
    ]
    warm_up = stages - stage - 1
    if virtual > 1:
        warm_up = 2 * warm_up + (virtual - 1) * stages
    warm_up = min(warm_up, len(forward))
    alternating = zip(forward[warm_up:], backward, strict=False)
    events = [*forward[:warm_up], *(event for pair in alternating for event in pair)]
    return (*events, *backward[len(forward) - warm_up :])


def _ready(event: Event, ends: dict[bool, list[list[float]]], send_seconds: float) -> float:
    """When what an event needs is there; UNKNOWN if that has not been simulated yet."""
    forward, chunk, micro_batch = event
    if forward:
        if chunk == 0:
            return 0.0
        end = ends[True][chunk - 1][micro_batch]
    elif chunk == len(ends[False]) - 1:
        return ends[True][chunk][micro_batch]
    else:
        end = ends[False][chunk + 1][micro_batch]
    return end if end == UNKNOWN else end + send_seconds
