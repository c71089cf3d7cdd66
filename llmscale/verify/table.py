"""A proof as a table for people and as plain data for programs."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from llmscale.verify.proof import Proof
from llmscale.verify.prove import Proven


def layout_in_words(proof: Proof) -> str:
    """``tensor 2 x pipeline 2 x data 2, interleaved, sequence parallel``."""
    layout, words = proof.parallel, []
    degrees = {n: getattr(layout, n) for n in ("tensor", "pipeline", "context", "data", "expert")}
    words.append(" x ".join(f"{n} {d}" for n, d in degrees.items() if (d or 1) > 1) or "one rank")
    words += ["interleaved"] if layout.virtual_pipeline > 1 else []
    words += [f"layers {list(layout.layers_per_stage)}"] if layout.layers_per_stage else []
    words += ["sequence parallel"] if layout.sequence else []
    words += ["distributed optimizer"] if proof.optimizer.distributed else []
    words += [f"{proof.recompute} recompute"] if proof.recompute != "none" else []
    words += ["separate documents"] if proof.separate_documents else []
    return f"{proof.model.family}, {', '.join(words)}"


def show_proven(console: Console, proven: Sequence[Proven]) -> None:
    """Prints a table a proof."""
    for one in proven:
        title = f"{one.stage}: {layout_in_words(one.proof)}, {one.proof.ranks} ranks"
        table = Table(title=title, title_justify="left")
        for column in ("", "worst difference", "allowed", "", "where"):
            table.add_column(column, overflow="fold")
        for check in one.checks:
            answer = "equal" if check.agrees else "DIFFERS"
            table.add_row(
                check.name, f"{check.worst:.1e}", f"{check.allowed:.0e}", answer, check.where
            )
        console.print(table)


def plain(proven: Sequence[Proven]) -> dict[str, Any]:
    """The same as data."""
    return {
        "agrees": all(one.agrees for one in proven),
        "proofs": [
            {
                "stage": one.stage,
                "agrees": one.agrees,
                "ranks": one.proof.ranks,
                "proof": one.proof.model_dump(mode="json", by_alias=True),
                "checks": [
                    {
                        "name": check.name,
                        "agrees": check.agrees,
                        "worst": check.worst if check.worst < float("inf") else None,
                        "allowed": check.allowed,
                        "where": check.where,
                    }
                    for check in one.checks
                ],
            }
            for one in proven
        ],
    }
