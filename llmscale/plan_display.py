"""Plans and errors of prediction as tables for people."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llmscale.learning_plans import LearningPlan
from llmscale.planning.explain import Reason
from llmscale.planning.forecast import Forecast, layout
from llmscale.planning.hardware import GIBIBYTE
from llmscale.planning.search import Search
from llmscale.planning.validate import Errors
from llmscale.plans import StagePlan

MOST_CAUSES = 12
VERDICTS = {"fits": "yes", "tight": "tight", "does not fit": "NO"}
ERROR_COLUMNS = (
    "source",
    "rows",
    "used",
    "median",
    "90 %",
    "bias",
    "rank",
    "memory rows",
    "median",
    "ran, called out",
    "out, called fits",
)


def show_plan(console: Console, stage: StagePlan, price: float | None) -> None:
    """Prints the recipe's layout and the best ones side by side, a column each."""
    columns = ([("recipe", stage.own)] if stage.own else []) + [
        (f"best {number}", found) for number, found in enumerate(stage.found.best, 1)
    ]
    if stage.why_not:
        console.print(f"{stage.name}: the recipe's layout: {stage.why_not}", markup=False)
    if not columns:
        console.print(f"{stage.name}: no layout fits; see --why", markup=False)
        return
    setup = columns[0][1].setup
    device = f"{setup.gpus:,} x {setup.device.name}"
    title = f"{stage.name}: {stage.parameters:,} parameters on {device}"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    cells = [_rows(found, stage.tokens, price) for _, found in columns]
    for (name, _), *values in zip(cells[0], *([v for _, v in rows] for rows in cells), strict=True):
        if any(values):
            table.add_row(name, *values)
    console.print(table)
    if stage.found.tried:
        console.print(f"{stage.found.tried:,} layouts fit; times are predictions, docs/planning.md")


def show_learning(console: Console, plan: LearningPlan, price: float | None) -> None:
    """Prints what the roles of a stage need, a column a group, and an iteration's parts."""
    if plan.setup is None or plan.seconds is None:
        console.print(f"{plan.name}: the recipe's layout: {plan.why_not}", markup=False)
        return
    policy, seconds, groups = plan.setup.policy, plan.seconds, plan.setup.groups
    ranks = sum(group.ranks for group in groups.values())
    device = f"{ranks:,} x {policy.device.name}"
    title = f"{plan.name}: a policy of {plan.parameters:,} parameters on {device}"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in groups:
        table.add_column(name, justify="right", no_wrap=True)
    rows = [(key, [_degree(value)]) for key, value in layout(policy).items()]
    rows += [("GPUs", [f"{group.ranks:,}" for group in groups.values()])]
    needs = list(plan.memory.values())
    rows += [("memory, GiB", [f"{need.total / GIBIBYTE:.1f}" for need in needs])]
    for part in vars(needs[0]):
        rows += [(f"  {part}", [_part(getattr(need, part) / GIBIBYTE, 1) for need in needs])]
    left = [(policy.device.memory_bytes - need.total) / GIBIBYTE for need in needs]
    rows += [
        ("  headroom", [f"{each:.1f}" for each in left]),
        ("fits", [VERDICTS[str(plan.verdict(name))] for name in groups]),
        (f"iteration of {plan.setup.samples:,} answers, s", [f"{seconds.total:.4g}"]),
    ]
    rows += [(f"  {name}", [_part(part, 3)]) for name, part in vars(seconds).items()]
    rows += [("iterations an hour", [f"{3600 / seconds.total:,.1f}"])]
    if price is not None:
        cost = 1000 * seconds.total / 3600 * ranks * price
        rows += [("cost of 1,000 iterations", [f"{cost:,.0f}"])]
    for name, values in rows:
        if any(values):
            table.add_row(name, *values)
    console.print(table)
    if plan.called:
        names = ", ".join(plan.called)
        console.print(f"without the time of rewards.{names}, which are no models", markup=False)


def _rows(found: Forecast, tokens: int | None, price: float | None) -> list[tuple[str, str]]:
    """Names and values of a forecast's column."""
    memory, step = found.memory, found.step
    rows = [(name, _degree(value)) for name, value in layout(found.setup).items()]
    rows += [("memory, GiB", f"{memory.total / GIBIBYTE:.1f}")]
    rows += [(f"  {name}", _part(size / GIBIBYTE, 1)) for name, size in vars(memory).items()]
    rows += [
        ("  headroom", f"{found.headroom / GIBIBYTE:.1f}"),
        ("fits", VERDICTS[found.verdict]),
        ("step, s", f"{step.total:.4g}"),
    ]
    rows += [(f"  {name}", _part(seconds, 3)) for name, seconds in vars(step).items()]
    rows += [
        ("tokens/s a GPU", f"{found.tokens_per_second:,.0f}"),
        ("TFLOP/s a GPU", f"{found.model_flops / 1e12:.3g}"),
        ("MFU", f"{found.model_flops / found.peak:.1%}"),
        ("HFU", f"{found.hardware_flops / found.peak:.1%}"),
    ]
    if tokens is not None:
        hours = found.gpu_hours(tokens)
        rows += [("days", f"{found.days(tokens):.3g}"), ("GPU-hours", f"{hours:,.0f}")]
        rows += [("cost", f"{hours * price:,.0f}")] if price is not None else []
    return rows


def _part(number: float, digits: int) -> str:
    return f"{number:.{digits}f}" if number >= 0.5 * 10**-digits else ""


def _degree(value: object) -> str:
    """Empty where nothing is split or done."""
    if value is True:
        return "yes"
    if isinstance(value, list):
        return f"{min(value)} to {max(value)}"
    return "" if value in (1, False, None, "none") else str(value)


def show_reasons(console: Console, reasons: Sequence[Reason], found: Search) -> None:
    """Prints where each number is from, and why layouts were left out."""
    table = Table("number", "value", "formula", "source", title="why", title_justify="left")
    for reason in reasons:
        table.add_row(*reason)
    console.print(table, markup=False)
    if found.impossible:
        causes = Table("left out", "because", title="not tried", title_justify="left")
        for cause, count in found.impossible.most_common(MOST_CAUSES):
            causes.add_row(f"{count:,}", cause)
        console.print(causes)


def show_errors(console: Console, found: Sequence[Errors]) -> None:
    """Prints a line a source, and below what the sources are."""
    title = "relative error of predicted step time, and of memory"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for heading in ERROR_COLUMNS:
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    numbers = [str(number) for number in range(1, len(found))] + ["all"]
    for number, each in zip(numbers, found, strict=True):
        table.add_row(
            number,
            str(each.rows),
            str(each.compared),
            _share(each.median),
            _share(each.ninetieth),
            _share(each.bias, signed=True),
            "" if each.rank_correlation is None else f"{each.rank_correlation:.3f}",
            str(each.memory_rows or ""),
            _share(each.memory_median),
            str(each.ran_called_out or ""),
            f"{each.out_called_fitting} of {each.out_of_memory}" if each.out_of_memory else "",
        )
    console.print(table)
    for number, each in zip(numbers[:-1], found, strict=False):
        console.print(f"{number:>3}  {each.source}", markup=False)


def _share(number: float | None, signed: bool = False) -> str:
    if number is None:
        return ""
    return f"{number:+.1%}" if signed else f"{number:.1%}"
