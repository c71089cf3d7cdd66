"""Ranks beside the policy's: they do what these ask for, until they are told to end."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from llmscale.errors import Interrupted, LlmscaleError
from llmscale.parallel.bridge import Bridge
from llmscale.rlhf.batches import Expected
from llmscale.rlhf.critics import OwnCritic
from llmscale.rlhf.remote import Failure, Reply, Request, sent_weights
from llmscale.rlhf.roles import Reference, Scorers
from llmscale.rlhf.rollout import SharedRollout
from llmscale.training.checkpoint import Checkpoints
from llmscale.training.rows import Rows

Task = Callable[..., Any]


def tasks(
    rollout: SharedRollout | None,
    reference: Reference | None,
    scorers: Scorers | None,
    critic: OwnCritic | None,
    checkpoints: Checkpoints,
    bridge: Bridge,
) -> dict[str, Task]:
    """What the ranks of a group can be asked for, by the roles that they play.

    Args:
        checkpoints: the policy's, of which a critic's state is a part.
    """
    found: dict[str, Task] = {}
    if rollout is not None:
        device = rollout.device
        found["answers"] = rollout.answers
        found["synchronize"] = lambda: rollout.synchronize(sent_weights(bridge, device))
    if reference is not None:
        found["log_probabilities"] = lambda rows, micro_batch: reference.log_probabilities(
            rows, micro_batch
        ).cpu()
    if scorers is not None:
        found["scores"] = scorers.scores
    if critic is not None:
        found |= _critic_tasks(critic, checkpoints)
    return found


def _critic_tasks(critic: OwnCritic, checkpoints: Checkpoints) -> dict[str, Task]:
    engine = critic.engine

    def values(rows: Rows) -> Tensor:
        return critic.values(rows.to(engine.device)).cpu()

    def learn(expected: Expected, step: int, number: int) -> dict[str, float]:
        return critic.learn(expected.to(engine.device), step, number)

    return {
        "values": values,
        "learn": learn,
        "write": lambda part: checkpoints.add(engine, part),
        "load": lambda part: checkpoints.load_part(engine, part),
    }


def serve(bridge: Bridge, able: Mapping[str, Task]) -> None:
    """Does what is asked for, request by request; every rank of the group calls it.

    Raises:
        Interrupted: if the policy's ranks ended before their time.
    """
    first = bridge.rank == 1
    while True:
        begun = time.perf_counter()
        request: Request = bridge.told()
        waited = time.perf_counter() - begun
        if request.task == "end":
            (reason,) = request.arguments
            if reason is not None:
                raise Interrupted(reason)
            return
        try:
            answer = able[request.task](*request.arguments)
        except LlmscaleError as error:
            answer = Failure(str(error))
        if first:
            bridge.reply(Reply(answer, waited))
