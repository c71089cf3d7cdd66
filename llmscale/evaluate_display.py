"""An evaluation's figures as lines for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

Figures = Mapping[str, Any]


def lines(figures: Figures) -> Iterator[str]:
    """What ``evaluate_command.evaluate`` found, a file or a task after the other."""
    tell = {"classification": _classification, "generation": _generation, "tasks": _task}
    for name, own in figures.items():
        if name in tell:
            for file, found in own.items():
                yield from tell[name](file, found)
        else:
            yield from _perplexity(name, own)


def _perplexity(file: str, figures: Figures) -> Iterator[str]:
    yield (
        f"{file}: {_figure(figures, 'perplexity')}, {_figure(figures, 'bits_per_byte')}, "
        f"{figures['tokens']:,} tokens"
    )


def _classification(file: str, figures: Figures) -> Iterator[str]:
    parts = [_figure(figures, "accuracy"), _figure(figures, "f1")]
    if "calibration_error" in figures:
        parts.append(_figure(figures, "calibration_error"))
    if "unanswered" in figures:
        parts.append(f"{figures['unanswered']:,} unanswered")
    largest = f"{figures['largest_label']:.4f} by its most frequent label"
    yield f"{file}: {', '.join(parts)}, {figures['texts']:,} texts; {largest}"
    for kind, own in figures.get("perturbations", {}).items():
        kept = f"; {_figure(own, 'accuracy_kept')}" if "accuracy_kept" in own else ""
        yield f"  {kind}: {_figure(own, 'accuracy')}{kept}"
    for group, own in figures.get("groups", {}).items():
        yield f"  {group}: {_figure(own, 'accuracy')}, {own['texts']:,} texts"
    if "accuracy_gap" in figures:
        yield f"  {_figure(figures, 'accuracy_gap')}, {_figure(figures, 'answer_gap')}"
    yield from _confusion(figures["confusion"])


def _confusion(counts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """A row a label that texts have, a column a label that was answered."""
    columns = list(next(iter(counts.values())))
    first = max(map(len, [*counts, "label"]))
    widths = [max(len(column), 6) for column in columns]

    def row(name: str, cells: list[str]) -> str:
        told = "  ".join(f"{own:>{width}}" for own, width in zip(cells, widths, strict=True))
        return f"  {name:<{first}}  {told}"

    yield row("label", columns)
    for label, own in counts.items():
        yield row(label, [f"{own[column]:,}" for column in columns])


def _generation(file: str, figures: Figures) -> Iterator[str]:
    names = [name for name in ("bleu", "rouge1", "rouge2", "rougel") if figures[name] is not None]
    told = [_figure(figures, name) for name in names] or ["nothing was written"]
    written = f"{figures['written']:,} of {figures['prompts']:,} written"
    yield f"{file}: {', '.join(told)}, {written}"
    if figures.get("empty"):
        more = " and others" if figures["empty"] > len(figures["empty_at"]) else ""
        places = ", ".join(figures["empty_at"])
        yield f"  {figures['empty']:,} empty, not scored: {places}{more}"


def _task(task: str, figures: Figures) -> Iterator[str]:
    told = [
        f"{name} {own:.4f}" if isinstance(own, float) else f"{name} {own}"
        for name, own in figures.items()
    ]
    yield f"{task}: {', '.join(told)}"


def _figure(figures: Figures, name: str) -> str:
    """A figure with its interval."""
    told = f"{name.replace('_', ' ')} {figures[name]:.4f}"
    if f"{name}_interval" in figures:
        low, high = figures[f"{name}_interval"]
        told += f" [{low:.4f}, {high:.4f}]"
    return told
