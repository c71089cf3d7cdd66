"""From what the ranks of a proof found to one answer: do they agree, and if not, where first."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LOSS, GRADIENT_NORM = 1e-5, 1e-4
"""Relative."""
PARAMETER = 1e-5
"""Absolute, after some AdamW steps of 1e-3."""
GRADIENT, GRADIENT_FLOOR = 1e-4, 2e-6
"""Of a tensor's largest gradient, and of the largest one of all tensors."""
FIGURE = 1e-5
"""Absolute: of what is told of learning from rewards, in nats or in spreads of a score."""
LOW_PRECISION_LOSS, LOW_PRECISION_NORM = 1e-2, 5e-2
"""Relative; bf16 has 8 bits."""


@dataclass(frozen=True)
class Check:
    """One line of the table: the worst difference, what is allowed, and where it is."""

    name: str
    worst: float
    allowed: float
    where: str = ""
    step: int | None = None
    """The first step that differs."""

    @property
    def agrees(self) -> bool:
        """Whether the worst difference is allowed."""
        return self.worst <= self.allowed


FIGURE_NAMES = {"kl": "KL to the reference", "update_kl": "KL of an update"}
Curve = Sequence[Mapping[str, float]]
"""Tokens, loss and gradient norm of each step, or the figures of each iteration."""


def curve_checks(ours: Curve, reference: Curve, first: int = 1) -> list[Check]:
    """Tokens, loss and gradient norm, of step ``first`` and those after it."""
    return [
        _curve_check("tokens counted", "tokens", ours, reference, 0.0, first),
        _curve_check("loss", "loss", ours, reference, LOSS, first),
        _curve_check("gradient norm", "gradient_norm", ours, reference, GRADIENT_NORM, first),
    ]


def figure_checks(ours: Curve, reference: Curve, first: int = 1) -> list[Check]:
    """What was told of each iteration of learning from rewards, from ``first`` on."""
    found = []
    for key in reference[0]:
        relative = key == "gradient_norm"
        allowed = GRADIENT_NORM if relative else FIGURE
        name = FIGURE_NAMES.get(key, key.replace("_", " "))
        found.append(_curve_check(name, key, ours, reference, allowed, first, relative))
    return found


def low_precision_checks(ours: Curve, reference: Curve) -> list[Check]:
    """The same of a run in bf16, whose rounding differs between layouts."""
    norm = LOW_PRECISION_NORM
    return [
        _curve_check("loss in bf16", "loss", ours, reference, LOW_PRECISION_LOSS, 1),
        _curve_check("gradient norm in bf16", "gradient_norm", ours, reference, norm, 1),
    ]


def _curve_check(
    name: str,
    key: str,
    ours: Curve,
    reference: Curve,
    allowed: float,
    first: int,
    relative: bool = True,
) -> Check:
    apart = [
        _apart(mine[key], theirs[key], relative)
        for mine, theirs in zip(ours, reference, strict=True)
    ]
    wrong = next((step for step, value in enumerate(apart) if value > allowed), None)
    if wrong is None:
        return Check(name, max(apart), allowed)
    return Check(name, max(apart), allowed, f"from step {wrong + first} on", wrong + first)


def _apart(ours: float | None, reference: float | None, relative: bool) -> float:
    if ours is None or reference is None or not math.isfinite(ours + reference):
        return math.inf
    return abs(ours - reference) / (max(abs(reference), 1e-30) if relative else 1.0)


def tensor_check(
    name: str,
    found: Iterable[Mapping[str, Any]],
    expected: Iterable[str],
    wrong_loss_from: int | None,
) -> Check:
    """The worst of some tensors, and which is to blame.

    Every tensor of ``expected`` must be among them. Gradients flow from the output to the
    input: while the loss is right, the wrong tensor nearest to the output is the first; once it
    is wrong, all are, and the farthest is told.
    """
    found = list(found)
    allowed = GRADIENT if name == "gradients" else PARAMETER
    missing = sorted({*expected} - {part for one in found for part in one["tensor"].split(" + ")})
    if missing:
        return Check(name, math.inf, allowed, f"no rank holds {missing[0]}")
    largest: dict[int, float] = {}
    for one in found:
        largest[one["step"]] = max(largest.get(one["step"], 0.0), one["scale"])
    excess = [(_excess(one, largest[one["step"]]), one) for one in found]
    worst = max(value for value, _ in excess)
    wrong = [(value, one) for value, one in excess if value > allowed]
    if not wrong:
        return Check(name, worst, allowed)
    step = min(one["step"] for _, one in wrong)
    first = sorted(
        ((value, one) for value, one in wrong if one["step"] == step),
        key=lambda pair: pair[1]["position"],
    )
    right_loss = wrong_loss_from is None or step < wrong_loss_from
    pick = first[-1] if right_loss else max(first, key=lambda pair: pair[0])
    blamed = _same_tensor_worst(pick[1], first)
    place = f", {blamed['place']} (rank {blamed['rank']})" if blamed["place"] else ""
    return Check(name, worst, allowed, f"from step {step} on: {blamed['tensor']}{place}", step)


def _excess(one: Mapping[str, Any], largest: float) -> float:
    """A gradient's difference is measured against its tensor, other differences as they are."""
    difference = one["difference"]
    if not math.isfinite(difference + one["scale"]):
        return math.inf
    if one["what"] != "gradient":
        return float(difference)
    return float(difference / max(one["scale"], GRADIENT_FLOOR / GRADIENT * largest, 1e-30))


def _same_tensor_worst(
    pick: Mapping[str, Any], wrong: Sequence[tuple[float, Mapping[str, Any]]]
) -> Mapping[str, Any]:
    same = [pair for pair in wrong if pair[1]["tensor"] == pick["tensor"]]
    return max(same, key=lambda pair: pair[0])[1]
