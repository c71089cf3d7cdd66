"""What a recipe says to Ray: ``cluster.ray``."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, ValidationInfo, field_validator

from llmscale.settings import Settings


class RaySettings(Settings):
    """What a run asks of a Ray cluster.

    ``placement`` is the strategy of the ranks' placement group: ``pack`` keeps neighbours on
    one node where it can, ``strict_spread`` gives each rank a node of its own. A stage waits
    ``wait_seconds`` for its resources, at its start and after a node is lost. ``restarts`` is
    how often in a row ranks that make no progress are started again. Where ``elastic``, training
    goes on with fewer copies of the model, and the same batches, while nodes are missing.
    """

    placement: Literal["pack", "strict_pack", "spread", "strict_spread"] = "pack"
    cpus_per_rank: PositiveInt = 1
    wait_seconds: PositiveInt = 600
    restarts: NonNegativeInt = 3
    elastic: bool = False

    @field_validator("elastic")
    @classmethod
    def _only_where_room_is_room(cls, elastic: bool, others: ValidationInfo) -> bool:
        placement = others.data.get("placement", "")
        if elastic and placement.startswith("strict_"):
            raise ValueError(f"does not go with placement {placement}; use pack or spread")
        return elastic
