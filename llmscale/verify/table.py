"""A proof as a table for people and as plain data for programs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from llmscale.verify.proof import Proof
from llmscale.verify.prove import Proven

if TYPE_CHECKING:
    from llmscale.verify.exact import ExactRank, HeldStage

GIBIBYTE = 2**30


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


def show_exact(console: Console, exact: "ExactRank") -> None:
    """Prints what a rank holds, and how many parameters each pipeline stage has."""
    place = ", ".join(f"{name} {number}" for name, number in exact.place.items())
    console.print(f"rank {exact.rank} of {exact.ranks:,}: {place}")
    table = Table("tensor", "shape", "type", "split over", "copies")
    for tensor in exact.own.tensors:
        shape = " x ".join(str(size) for size in tensor.shape)
        table.add_row(tensor.name, shape, tensor.dtype, str(tensor.parts), str(tensor.copies))
    console.print(table)
    sizes = {
        "weights": exact.weight_bytes,
        "gradients": exact.gradient_bytes,
        "optimizer": exact.optimizer_bytes,
    }
    console.print(", ".join(f"{name} {size / GIBIBYTE:.2f} GiB" for name, size in sizes.items()))
    stages = Table("stage", "layers", "parameters a rank")
    for held in exact.stages:
        stages.add_row(str(held.number), _ranges(held.layers), f"{held.parameters:,}")
    console.print(stages)
    console.print(
        f"all stages: {exact.total_parameters:,} parameters without padding and copies; "
        f"the architecture has {exact.expected_parameters:,}"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """``0-5, 96-101``"""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in found)


def plain_exact(exact: "ExactRank") -> dict[str, Any]:
    """The same as data, with the tensors of every stage."""
    return {
        "rank": exact.rank,
        "ranks": exact.ranks,
        "place": exact.place,
        "weight_bytes": exact.weight_bytes,
        "gradient_bytes": exact.gradient_bytes,
        "optimizer_bytes": exact.optimizer_bytes,
        "total_parameters": exact.total_parameters,
        "expected_parameters": exact.expected_parameters,
        "tensors": _plain_tensors(exact.own),
        "stages": [
            {
                "stage": held.number,
                "layers": list(held.layers),
                "parameters": held.parameters,
                "tensors": _plain_tensors(held),
            }
            for held in exact.stages
        ],
    }


def _plain_tensors(held: "HeldStage") -> list[dict[str, Any]]:
    return [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "dtype": tensor.dtype,
            "split": tensor.parts,
            "copies": tensor.copies,
        }
        for tensor in held.tensors
    ]
