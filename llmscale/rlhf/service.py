"""Ranks beside the policy's: they do what these ask for, until they are told to end."""

from collections.abc import Callable, Mapping
from typing import Any

from llmscale.errors import Interrupted, LlmscaleError
from llmscale.parallel.bridge import Bridge
from llmscale.rlhf.remote import Failure, Request, sent_weights
from llmscale.rlhf.roles import Reference, Scorers
from llmscale.rlhf.rollout import SharedRollout

Task = Callable[..., Any]


def tasks(
    rollout: SharedRollout | None,
    reference: Reference | None,
    scorers: Scorers | None,
    bridge: Bridge,
) -> dict[str, Task]:
    """What the ranks of a group can be asked for, by the roles that they play."""
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
    return found


def serve(bridge: Bridge, able: Mapping[str, Task]) -> None:
    """Does what is asked for, request by request; every rank of the group calls it.

    Raises:
        Interrupted: if the policy's ranks ended before their time.
    """
    first = bridge.rank == 1
    while True:
        request: Request = bridge.told()
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
            bridge.reply(answer)
