"""Which ranks play which roles."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from llmscale.models.architecture import Architecture
from llmscale.parallel.layout import Layout
from llmscale.settings import Name, Problem, Settings, under
from llmscale.training.settings import EngineName, Zero

Role = Literal["rollout", "reference", "rewards", "critic"]
ROLES: tuple[Role, ...] = get_args(Role)
NEVER_LEARN: tuple[Role, ...] = ("rollout", "reference", "rewards")
SPLIT: tuple[Role, ...] = ("reference", "critic")
"""Those at a layout; others are whole on every rank."""


class RankGroup(Settings):
    """Ranks beside the policy's, which play some roles for it.

    ``parallel`` is the layout of a reference and a critic, and ``tensor * pipeline * data`` their
    number; ``engine`` and ``zero`` are theirs, too, and by default the policy's. Rollouts and
    reward models are whole on every rank, which share the texts.
    """

    roles: Annotated[tuple[Role, ...], Field(min_length=1)]
    parallel: Layout = Layout()
    engine: EngineName | None = None
    zero: Zero | None = None

    def layout(self, left: int | None) -> Layout:
        """The layout with its number of copies: by default 1, or what ``left`` ranks hold."""
        data = self.parallel.data or max(1, (left or 1) // self.parallel.model_ranks)
        return self.parallel.model_copy(update={"data": data})


def _groups(placement: Any) -> Any:
    """The groups that a word stands for."""
    if placement == "colocated":
        return {}
    return {"others": {"roles": [*NEVER_LEARN]}} if placement == "separate" else placement


Placement = Annotated[dict[Name, RankGroup], BeforeValidator(_groups)]
"""Groups by their names; ``colocated`` is none, ``separate`` one of all that never learn."""


def layouts(policy: Layout, placement: Mapping[str, RankGroup], ranks: int) -> list[Layout]:
    """Those of the policy and of each group, with their numbers of copies.

    Where the policy's ``data`` is given, the last group has the ranks that are left, if its own
    is not; else the policy has them.
    """
    groups = list(placement.values())
    found = [group.layout(None) for group in groups]
    if groups and policy.data is not None:
        others = (policy, *found[:-1])
        left = ranks - sum(layout.model_ranks * (layout.data or 1) for layout in others)
        found[-1] = groups[-1].layout(left)
    taken = sum(layout.model_ranks * (layout.data or 1) for layout in found)
    data = policy.data or max(1, (ranks - taken) // policy.model_ranks)
    return [policy.model_copy(update={"data": data}) if groups else policy, *found]


def placement_problems(
    placement: Mapping[str, RankGroup], architecture: Architecture, wanted: Mapping[Role, bool]
) -> Iterator[Problem]:
    """What keeps groups from playing their roles, but for the number of ranks.

    Args:
        wanted: of roles that not every recipe has, whether this one does.
    """
    taken: dict[str, str] = {}
    for name, group in placement.items():
        for role in group.roles:
            if role in taken:
                message = f"{role} is {taken[role]}'s; name it once"
                yield Problem((name, "roles"), message)
            taken[role] = name
        if not {*SPLIT} & {*group.roles} and group.parallel.model_ranks > 1:
            yield Problem(
                (name, "parallel"),
                "rollouts and reward models are whole on every rank; use data",
            )
        if any(wanted[role] for role in SPLIT if role in group.roles):
            misfits = architecture.layout_problems(group.parallel)
            yield from under(name, under("parallel", misfits))
        if "critic" in group.roles and not wanted["critic"]:
            yield Problem((name, "roles"), "only algorithm ppo has a critic; remove it")
        if group.roles == ("reference",) and not wanted["reference"]:
            yield Problem((name,), "kl.coefficient is 0, so that there is no reference; remove it")
