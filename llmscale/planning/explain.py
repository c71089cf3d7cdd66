"""Where each number of a forecast is from: its formula, with the numbers in it, and its source."""

from typing import NamedTuple

from llmscale.planning.constants import PLAUSIBLE, Constants
from llmscale.planning.forecast import Forecast, recomputed_share
from llmscale.planning.hardware import GIBIBYTE
from llmscale.planning.memory import model_state
from llmscale.planning.parameters import most_parameters
from llmscale.planning.setup import Setup

STATE = ("weights", "gradients", "optimizer")
KORTHIKANTI = "Korthikanti et al. 2022, arXiv:2205.05198"
NARAYANAN = "Narayanan et al. 2021, arXiv:2104.04473"


class Reason(NamedTuple):
    """A number's name and value, how it came about, and by whom."""

    number: str
    value: str
    formula: str
    source: str


def explain(found: Forecast, constants: Constants) -> list[Reason]:
    """A reason for each number of a forecast that is not 0."""
    reasons = [*_of_memory(found), *_of_time(found, constants), *_of_figures(found)]
    return [*reasons, *_of_device(found.setup, constants)]


def _of_memory(found: Forecast) -> list[Reason]:
    setup, need = found.setup, found.memory
    held = most_parameters(setup)
    own = held.layers + held.experts
    sizes = dict(zip(STATE, model_state(setup, held.layers, held.experts), strict=True))
    each = {
        **{
            name: f"{size / own:.3g} bytes x parameters of the stage's layers on a rank "
            f"({own:,.0f}), {setup.sharding} shared by {setup.data * setup.context} ranks"
            for name, size in sizes.items()
        },
        "vocabulary": f"the same three of embedding and output layer ({held.tables:,.0f} "
        "parameters)",
        "activations": f"layers x sbh (norms, linear inputs) / {_whole_share(setup)} + (queries, "
        f"keys, values, feed-forward) / t, kept by {setup.recompute} recompute, of "
        f"{min(setup.micro_batches, setup.pipeline)} micro-batches under way",
        "logits": "8 bytes x tokens x vocabulary / t, on the last stage",
        "buffers": "CUDA context 1.5 GiB, NCCL 0.35 GiB a group, 5 % of activations in pieces, "
        "one layer's gradients of activations, FSDP's gathered layers",
    }
    sources = {
        "weights": f"{KORTHIKANTI}, section 4: 18 bytes a parameter, 6 + 12/d shared",
        "activations": f"{KORTHIKANTI}, equations 2 and 4, section 4.2.3",
        "logits": f"{KORTHIKANTI}, section 4.3",
        "optimizer": "ZeRO, Rajbhandari et al. 2020, section 3",
        "buffers": "llmscale/planning/memory.py",
    }
    return [
        Reason(f"memory: {name}", _gib(size), each[name], sources.get(name, sources["weights"]))
        for name, size in vars(need).items()
        if size
    ]


def _whole_share(setup: Setup) -> int:
    return setup.tensor if setup.sequence_parallel else 1


def _of_time(found: Forecast, constants: Constants) -> list[Reason]:
    setup, m = found.setup, found.setup.micro_batches
    formulas = {
        "compute": (
            f"{m} micro-batches x the busiest stage's products (2mnk / rate, whole waves of 128 x "
            "256 tiles, at least their bytes / bandwidth), attention, and passes over memory",
            "roofline, Williams et al. 2009; NVIDIA, Matrix Multiplication Background",
        ),
        "recompute": (
            f"{setup.recompute}: what the backward pass computes again",
            f"{KORTHIKANTI}, section 5",
        ),
        "tensor": (
            "2 all-reduces of 2bsh bytes a layer forward, 2 backward; 2 (t-1)/t of them are sent",
            "Shoeybi et al. 2019, section 3; rings, Patarasuk and Yuan 2009",
        ),
        "context": (
            "keys and values of all context ranks, 3 times, beside attention",
            "ring attention, Liu et al. 2023",
        ),
        "expert": ("2 all-to-alls of the routed tokens each way", "GShard, Lepikhin et al. 2021"),
        "pipeline": ("2 messages of 2bsh bytes a micro-batch", f"{NARAYANAN}, section 4.1"),
        "data": (
            f"gradients of {setup.reduced_bytes:g} bytes reduced over {setup.data} ranks, weights "
            f"gathered, less the {constants.hidden_data:.0%} that runs beside computation",
            "ZeRO, Rajbhandari et al. 2020, section 7",
        ),
        "bubble": (
            f"simulated schedule less {m} x the busiest stage; near (p-1)/(v m) = "
            f"{(setup.pipeline - 1) / setup.virtual_pipeline / m:.1%} of it",
            f"{NARAYANAN}, section 2.2",
        ),
        "optimizer": (
            "34 bytes a parameter of a rank's share / bandwidth",
            "AdamW, mixed precision",
        ),
        "waiting": (
            f"{constants.straggling:.1%} of the step for each doubling of hosts",
            "fitted, benchmarks/planning.py",
        ),
    }
    return [
        Reason(f"step: {name}", f"{seconds:.4g} s", *formulas[name])
        for name, seconds in vars(found.step).items()
        if seconds
    ]


def _of_figures(found: Forecast) -> list[Reason]:
    setup = found.setup
    sample = setup.architecture.flops_per_sample(setup.vocabulary, setup.sequence_length)
    return [
        Reason(
            "tokens a second a GPU",
            f"{found.tokens_per_second:,.0f}",
            f"{setup.global_batch} samples x {setup.sequence_length} tokens / {setup.gpus} GPUs / "
            f"{found.step.total:.4g} s",
            "definition",
        ),
        Reason(
            "model TFLOP/s a GPU",
            f"{found.model_flops / 1e12:.1f}",
            f"{sample:.4g} FLOP a sample: 6 a weight and token, half of attention's square",
            "Chowdhery et al. 2022, appendix B; causal",
        ),
        Reason(
            "MFU",
            f"{found.model_flops / found.peak:.1%}",
            f"of {found.peak / 1e12:,.0f} TFLOP/s",
            "; ".join(setup.device.sources),
        ),
        Reason(
            "HFU",
            f"{found.hardware_flops / found.peak:.1%}",
            f"with {recomputed_share(setup):.1%} computed again",
            f"{KORTHIKANTI}, appendix A",
        ),
    ]


def _of_device(setup: Setup, constants: Constants) -> list[Reason]:
    device, rows = setup.device, []
    if device.generation != "cpu":
        names = (f"{device.generation}_products", "memory", "link", "network")
        for name in names:
            low, high, meaning = PLAUSIBLE[name]
            value = getattr(constants, name)
            rows.append(
                Reason(name, f"{value:.3g}", f"{meaning}; plausible {low:g} to {high:g}", "fitted")
            )
    figures = (
        f"{device.memory_bytes / GIBIBYTE:.1f} GiB at {device.memory_bandwidth / 1e9:,.0f} GB/s, "
        f"NVLink {device.link_bandwidth / 1e9:,.0f} GB/s among {device.domain}, network "
        f"{device.network_bandwidth / 1e9:g} GB/s a GPU"
    )
    return [*rows, Reason(device.name, figures, "", "; ".join(device.sources))]


def _gib(size: float) -> str:
    return f"{size / GIBIBYTE:.2f} GiB"
