"""All layouts of a model on a number of GPUs, the quickest that fit first."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from llmscale.parallel.layout import Layout
from llmscale.planning.constants import Constants
from llmscale.planning.forecast import Forecast, forecast
from llmscale.planning.memory import memory, verdict
from llmscale.planning.setup import Recompute, Setup
from llmscale.planning.step_time import MicroBatchTime, micro_batch_time, step_time
from llmscale.settings import Problem, divisors

LARGEST_TENSOR, LARGEST_CONTEXT, LARGEST_MICRO_BATCH = 16, 16, 16
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
SIMULATED = 12
"""Layouts whose schedule is simulated, of those that the closed form finds quickest."""


@dataclass
class Search:
    """What came of a search.

    Attributes:
        best: the quickest first, all within memory; last, the quickest of them in FP8.
        tried: layouts whose time was predicted.
        impossible: why others were left out, and how many.
    """

    best: list[Forecast] = field(default_factory=list)
    tried: int = 0
    impossible: Counter[str] = field(default_factory=Counter)


def search(base: Setup, constants: Constants, most: int = 4) -> Search:
    """The quickest layouts for a model, batch, device and number of GPUs.

    Sequence parallelism, where there is tensor parallelism, and the distributed optimizer,
    where there are copies of the model, cost neither time nor memory here, so layouts
    without them are not tried.
    """
    found = Search()
    ranked: list[tuple[float, Setup]] = []
    for inner in _rank_layouts(base, found.impossible):
        times: dict[Recompute, MicroBatchTime] = {}
        for candidate in _stage_layouts(inner, found.impossible):
            fitting = _with_least_recompute(candidate)
            if fitting is None:
                found.impossible["needs more than the device's memory"] += 1
                continue
            if fitting.recompute not in times:
                times[fitting.recompute] = micro_batch_time(fitting, constants)
            inside = times[fitting.recompute]
            step = step_time(fitting, constants, simulated=False, inner=inside)
            ranked.append((step.total, fitting))
    found.tried = len(ranked)
    ranked.sort(key=lambda pair: pair[0])
    quickest = [forecast(setup, constants) for _, setup in ranked[:SIMULATED]]
    found.best = sorted(quickest, key=lambda each: each.step.total)[:most]
    found.best += _in_eight_bits(quickest, constants)
    return found


def _in_eight_bits(quickest: Sequence[Forecast], constants: Constants) -> list[Forecast]:
    """The quickest of these layouts with FP8 products, where the model and device have them."""
    setups = [each.setup for each in quickest if each.setup.number == "half"]
    possible = (
        forecast(replace(setup, precision="fp8", number="fp8"), constants)
        for setup in setups
        if "fp8" in setup.device.peaks and setup.architecture.traits.objective == "causal"
    )
    return sorted(possible, key=lambda each: each.step.total)[:1]


def _with_least_recompute(setup: Setup) -> Setup | None:
    """What is recomputed only costs time, so none is where none is needed."""
    for recompute in RECOMPUTES:
        candidate = replace(setup, recompute=recompute)
        if verdict(memory(candidate), candidate.device) != "does not fit":
            return candidate
    return None


def _rank_layouts(base: Setup, impossible: Counter[str]) -> Iterator[Setup]:
    """Every way to split a layer and a micro-batch over ranks."""
    model = base.architecture
    for tensor in _powers(min(LARGEST_TENSOR, base.device.domain, base.gpus)):
        for context in _powers(min(LARGEST_CONTEXT, base.gpus // tensor)):
            if base.gpus % (tensor * context):
                impossible["tensor x context does not divide the GPUs"] += 1
                continue
            for expert in _experts(base, tensor, context):
                layout = Layout(tensor=tensor, context=context, expert=expert, sequence=tensor > 1)
                cause = _misfit(model.layout_problems(layout, base.sequence_length))
                if cause is not None:
                    impossible[cause] += 1
                    continue
                for micro in _powers(min(LARGEST_MICRO_BATCH, base.global_batch)):
                    yield replace(
                        base,
                        tensor=tensor,
                        context=context,
                        expert=expert,
                        sequence_parallel=tensor > 1,
                        micro_batch=micro,
                        layers_per_stage=None,
                    )


def _experts(base: Setup, tensor: int, context: int) -> list[int]:
    if not base.architecture.experts:
        return [1]
    ranks = base.gpus // (tensor * context)
    return [degree for degree in divisors(base.architecture.experts) if degree <= ranks * tensor]


def _stage_layouts(inner: Setup, impossible: Counter[str]) -> Iterator[Setup]:
    """Every way to lay such ranks out as stages and copies."""
    layers = inner.architecture.all_layers
    ranks = inner.gpus // (inner.tensor * inner.context)
    for pipeline in divisors(ranks):
        if pipeline > layers:
            break
        data = ranks // pipeline
        share, over = divmod(inner.global_batch, data * inner.micro_batch)
        if over:
            impossible["micro x data does not divide the global batch"] += 1
        elif (ranks * inner.tensor * inner.context // pipeline) % inner.expert:
            impossible["expert does not divide the ranks of a stage"] += 1
        else:
            for virtual in _chunks(inner, pipeline):
                if virtual > 1 and share % pipeline:
                    impossible["micro-batches are no multiple of pipeline, to interleave"] += 1
                    continue
                candidate = replace(
                    inner,
                    pipeline=pipeline,
                    virtual_pipeline=virtual,
                    data=data,
                    sharding="optimizer" if data * inner.context > 1 else "none",
                )
                if layers % (pipeline * virtual):
                    candidate = replace(candidate, layers_per_stage=candidate.stage_layers)
                yield candidate


def _chunks(inner: Setup, pipeline: int) -> list[int]:
    """Numbers of chunks a stage can hold; of layers that stages cannot share evenly, a few."""
    layers = inner.architecture.all_layers
    if pipeline == 1:
        return [1]
    if layers % pipeline == 0:
        return divisors(layers // pipeline)
    return [] if inner.architecture.decoders else _powers(layers // pipeline)


def _powers(most: int) -> list[int]:
    return [2**k for k in range(most.bit_length()) if 2**k <= most]


def _misfit(problems: Iterator[Problem]) -> str | None:
    """The first problem, without its mend."""
    problem = next(problems, None)
    return None if problem is None else f"{problem.path[0]} {problem.message.split(';')[0]}"
