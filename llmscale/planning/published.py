"""Rows of a table of published results: what was run, and what came of it.

What a row leaves out is taken as its kind of publication has it, and each such choice is
here; where there is none, ``Row.why_not`` says what is missing.
"""

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmscale.errors import RecipeError
from llmscale.models.architecture import Architecture
from llmscale.planning.flops import Convention, step_flops
from llmscale.planning.hardware import Device, Number, find_device
from llmscale.planning.memory import memory
from llmscale.planning.setup import Kernels, Overlap, Recompute, Setup, Sharding
from llmscale.settings import divisors

OUTSIDE_THE_PIPELINE = re.compile(r"\blora\b", re.IGNORECASE)
DEFAULT_VOCABULARY = 51200
LARGEST_NUMBER = 2**24
"""Above every size, degree and rate of a run, so that no cell keeps a reader busy for hours."""
MOST_STAGES = 1024
JEAN_ZAY_NETWORK = 4 * 100e9 / 8 / 8
"""Bytes a second of a GPU: four 100 Gb/s ports of Omni-Path a node of 8 A100 (BLOOM's
tr11-176B-ml/README.md, "Hardware")."""


class Unpredictable(Exception):
    """A row lacks what a prediction needs; the message says what."""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        cells: as they are in the file.
        setup: what was run; None where ``why_not`` says why that is not known.
        seconds: of a step, measured, or from what was measured.
        memory_gib: measured.
        ran_out: of memory; then nothing was measured.
    """

    cells: Mapping[str, str]
    setup: Setup | None = None
    why_not: str = ""
    seconds: float | None = None
    memory_gib: float | None = None
    ran_out: bool = False

    @property
    def source(self) -> str:
        """The publication."""
        return self.cells.get("source", "")


def read_table(file: Path) -> tuple[list[str], list[Row]]:
    """The columns of a CSV file, and its rows.

    Raises:
        RecipeError: if the file cannot be read as a table.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened, restkey="", restval="")
            columns = list(reader.fieldnames or [])
            rows = [read_row({c: str(cells.get(c) or "") for c in columns}) for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        cause = getattr(error, "strerror", None) or error
        raise RecipeError(f"{file}: {cause}; give a table as CSV, in UTF-8") from None
    if not rows or ("model" not in columns and "hidden" not in columns):
        raise RecipeError(
            f"{file}: is no table of results; its first line names columns: source, model, layers, "
            "hidden, heads, seq, vocab, gpu, gpus, tp, pp, micro_batch, global_batch, iter_s ..."
        )
    return columns, rows


def read_row(cells: Mapping[str, str]) -> Row:
    """One row; whatever it holds gives a row, not an error."""
    notes = cells.get("notes", "")
    row = Row(cells, memory_gib=_measured_memory(notes), ran_out=_ran_out(cells))
    try:
        setup = _setup(cells)
        return replace(row, setup=setup, seconds=_measured_seconds(cells, setup))
    except Unpredictable as error:
        return replace(row, why_not=str(error))
    except (RecipeError, ArithmeticError, ValueError) as error:
        return replace(row, why_not=" ".join(str(error).split()) or type(error).__name__)


def _number(cells: Mapping[str, str], key: str) -> float | None:
    """What a cell says; None where it is empty.

    Raises:
        Unpredictable: if it is no positive number.
    """
    text = cells.get(key, "").strip().replace(",", "")
    if not text or text.lower() in ("n/a", "na", "-", "none", "nan"):
        return None
    try:
        number = float(text)
    except ValueError:
        raise Unpredictable(f"{key}: {text!r} is no number") from None
    if not 0 < number <= LARGEST_NUMBER:
        raise Unpredictable(f"{key}: {text!r} is not between 0 and {LARGEST_NUMBER:,}")
    return number


def _whole(cells: Mapping[str, str], key: str, otherwise: int) -> int:
    number = _number(cells, key)
    return otherwise if number is None else max(1, round(number))


def _needed(cells: Mapping[str, str], *keys: str) -> list[int]:
    missing = [key for key in keys if _number(cells, key) is None]
    if missing:
        raise Unpredictable(f"{', '.join(missing)}: empty")
    return [_whole(cells, key, 1) for key in keys]


def _setup(cells: Mapping[str, str]) -> Setup:
    text = " ".join(cells.get(key, "") for key in ("source", "table", "notes"))
    if OUTSIDE_THE_PIPELINE.search(text):
        raise Unpredictable("trains adapters, not all weights")
    if not cells.get("gpu", "").strip():
        raise Unpredictable("gpu: empty")
    device = _device(cells["gpu"], text)
    gpus, length = _needed(cells, "gpus", "seq")
    tensor, pipeline, context = _degrees(cells, device, gpus)
    data = gpus // (tensor * pipeline * context)
    micro_batch, global_batch = _batch(cells, text, pipeline, data)
    vocabulary = _whole(cells, "vocab", DEFAULT_VOCABULARY)
    base = Setup(
        architecture=_architecture(cells, vocabulary, length, tensor, pipeline),
        vocabulary=vocabulary,
        sequence_length=length,
        device=device,
        gpus=gpus,
        global_batch=global_batch,
        micro_batch=micro_batch,
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        expert=_whole(cells, "ep", 1),
        data=data,
    )
    chunks = _virtual_pipeline(cells, text, base)
    return _with_recompute(
        cells, _with_software(cells, text, replace(base, virtual_pipeline=chunks))
    )


def _degrees(cells: Mapping[str, str], device: Device, gpus: int) -> tuple[int, int, int]:
    """Tensor, pipeline and context; what one domain cannot hold must have been split."""
    if _number(cells, "tp") is None and _number(cells, "pp") is None and gpus > device.domain:
        raise Unpredictable("tp, pp: empty")
    tensor, pipeline, context = (_whole(cells, key, 1) for key in ("tp", "pp", "cp"))
    if tensor * pipeline * context > gpus or pipeline > MOST_STAGES:
        raise Unpredictable(f"tp x pp x cp: {tensor} x {pipeline} x {context} on {gpus} gpus")
    return tensor, pipeline, context


def _device(name: str, text: str) -> Device:
    """With the network that the publication tells of."""
    device = find_device(name)
    if text.startswith("bigscience-workshop/"):
        return replace(device, network_bandwidth=JEAN_ZAY_NETWORK)
    told = re.search(r"(\d{2,5}) ?Gb(?:ps|/s|it/s) node", text)
    if told is None:
        return device
    return replace(device, network_bandwidth=float(told[1]) * 1e9 / 8 / 8)


def _batch(cells: Mapping[str, str], text: str, pipeline: int, data: int) -> tuple[int, int]:
    """Of a micro-batch, and of a step.

    Where no micro-batch is printed: torchtitan cuts a rank's batch into as many as there are
    stages; others are taken at one sample.
    """
    micro, whole = _number(cells, "micro_batch"), _number(cells, "global_batch")
    local = re.search(r"local batch (\d+)", text)
    if local is not None:
        own = int(local[1])
        return max(1, round(micro or own / pipeline)), round(whole or own * data)
    if micro is None and whole is None:
        raise Unpredictable("micro_batch, global_batch: empty")
    size = max(1, round(micro or 1))
    return size, max(1, round(whole or size * data))


def _virtual_pipeline(cells: Mapping[str, str], text: str, setup: Setup) -> int:
    """Chunks a stage: as printed; else one, where nothing tells that schedules are interleaved.

    torchtitan's interleaved schedule has 2. Megatron's rows that leave the number out, all of
    those on Hopper and later, are taken at about two layers a chunk.
    """
    lower = text.lower()
    if setup.pipeline == 1:
        return 1
    if (printed := _number(cells, "vpp")) is not None:
        return max(1, min(round(printed), setup.architecture.all_layers // setup.pipeline))
    if "torchtitan" in lower:
        return 2 if re.search(r"\binterleaved\b", lower) else 1
    left_out = re.search(r"\bvpp\b[^;]*not printed|\binterleaved\b", lower) is not None
    if not left_out and setup.device.generation not in ("hopper", "blackwell"):
        return 1
    return max(1, setup.architecture.all_layers // setup.pipeline // 2)


def _architecture(
    cells: Mapping[str, str], vocabulary: int, length: int, tensor: int, pipeline: int
) -> Architecture:
    (hidden,) = _needed(cells, "hidden")
    printed = _number(cells, "params_b")
    heads = _whole(cells, "heads", 0) or _usual_heads(hidden, tensor)
    shape: dict[str, Any] = {
        "hidden_size": hidden,
        "attention_heads": heads,
        "key_value_heads": _whole(cells, "kv_heads", heads),
        "head_size": max(1, hidden // heads),
        "ffn_size": _whole(cells, "ffn", 4 * hidden),
        "sequence_length": length,
    }
    layers = _number(cells, "layers")
    if layers is None and printed is None:
        raise Unpredictable("layers, params_b: empty")
    if max(layers or 0, heads, pipeline) > MOST_STAGES:
        raise Unpredictable(f"layers, heads, pp: above {MOST_STAGES:,}")
    found = []
    for family in ("gpt2", "llama"):
        count = layers
        if count is None:
            count = _layers_of(family, shape, vocabulary, float(printed or 0) * 1e9, pipeline)
        found.append(Architecture(family=family, layers=max(1, round(count)), **shape))
    plain, gated = found
    if layers is None:
        return plain
    if printed is None:
        return gated if _number(cells, "kv_heads") else plain
    return min(found, key=lambda model: abs(model.parameters(vocabulary) - printed * 1e9))


def _usual_heads(hidden: int, tensor: int) -> int:
    """Heads of about 128 that can be split."""
    fitting = [heads for heads in divisors(hidden) if heads % tensor == 0]
    return min(fitting or [1], key=lambda heads: abs(hidden / heads - 128))


def _layers_of(
    family: Any, shape: dict[str, Any], vocabulary: int, parameters: float, pipeline: int
) -> int:
    """Layers of a model of a printed size: the nearest number that all stages share evenly."""
    one = Architecture(family=family, layers=1, **shape)
    two = Architecture(family=family, layers=2, **shape)
    layer = two.parameters(vocabulary) - one.parameters(vocabulary)
    outer = one.parameters(vocabulary) - layer
    return max(1, round((parameters - outer) / layer / pipeline)) * pipeline


def _precision(cells: Mapping[str, str]) -> tuple[Number, str]:
    """What products multiply, and how their factors are laid out."""
    text = cells.get("precision", "").lower().split("(")[0]
    if "fp4" in text:
        return "fp4", "block"
    if "mx" in text:
        return "fp8", "block"
    if "fp8" in text or "float8" in text:
        return "fp8", "row" if "row" in text else "tensor"
    return ("fp32" if text.strip() in ("fp32", "tf32") else "half"), "tensor"


def _with_software(cells: Mapping[str, str], text: str, setup: Setup) -> Setup:
    """What the software of the row's kind does."""
    number, scaling = _precision(cells)
    lower, device = text.lower(), setup.device
    sharding = _sharding(lower)
    pytorch = sharding == "weights" and ("torchtitan" in lower or "foundry" in lower)
    pytorch = pytorch or "shard_grad_op" in lower
    recent = device.generation in ("hopper", "blackwell")
    half = "fp16" in cells.get("precision", "").lower()
    if sharding is None:
        sharding = "none" if half or device.generation == "volta" else "optimizer"
    deepspeed = re.search(r"zero-?\d", lower) is not None
    told = cells.get("seq_parallel", "").strip().lower()
    kernels = _kernels(cells, lower, setup, pytorch)
    return replace(
        setup,
        number=number,
        scaling=scaling,  # type: ignore[arg-type]
        sharding=sharding,
        kernels=kernels,
        dropout=kernels == "unfused",
        fused=not pytorch or _compiled(cells),
        sequence_parallel=setup.tensor > 1 and (told == "yes" or (not told and recent)),
        tensor_overlap=_tensor_overlap(cells, pytorch or deepspeed, recent),
        scattered_sends=True,
        all_reduced=deepspeed,
        data_overlap=recent,
        gather_overlap=recent,
        gradient_bytes=2.0 if half and deepspeed else 4.0,
        optimizer_bytes=16.0 if deepspeed else 12.0,
        copied_gradient_bytes=(2.0 if half else 4.0) if deepspeed else 0.0,
        reduced_bytes=2.0 if half or (recent and not pytorch) else 4.0,
    )


def _compiled(cells: Mapping[str, str]) -> bool:
    """Whether a note of its own says so; ``without/with compile`` tells of other rows."""
    notes = cells.get("notes", "").lower().split(";")
    return any("compile" in note and "without" not in note for note in notes)


def _tensor_overlap(cells: Mapping[str, str], plain: bool, recent: bool) -> Overlap:
    """NVIDIA's recipes for Hopper and later use user buffers; ``plain`` software overlaps none."""
    if re.search(r"async ?tp", cells.get("notes", ""), re.IGNORECASE):
        return "both"
    if plain:
        return "none"
    return "both" if recent else "backward"


def _sharding(lower: str) -> Sharding | None:
    told = re.search(r"zero-?(\d)", lower)
    if told is not None and int(told[1]) <= 3:
        return ("none", "optimizer", "gradients", "weights")[int(told[1])]
    if "shard_grad_op" in lower:
        return "gradients"
    if ("fsdp" in lower and "fsdp=0" not in lower) or "torchtitan" in lower:
        return "weights"
    return None


def _kernels(cells: Mapping[str, str], lower: str, setup: Setup, pytorch: bool) -> Kernels:
    """Attention: flash-attn is named or the rule for PyTorch; Megatron's first three years on
    V100 and A100 had scores in memory, and said so by what was recomputed."""
    if pytorch:
        return "ported"
    if setup.device.generation in ("hopper", "blackwell") or "flash" in lower:
        return "native"
    old = setup.device.generation == "volta" or "fp16" in cells.get("precision", "").lower()
    recomputed = cells.get("recompute", "").strip().lower() in ("full", "selective")
    return "unfused" if old or recomputed else "native"


def _with_recompute(cells: Mapping[str, str], setup: Setup) -> Setup:
    """As printed; else whole layers again, as many as it takes for the run to fit."""
    told = cells.get("recompute", "").strip().lower()
    words: dict[str, Recompute] = {
        "none": "none",
        "no": "none",
        "full": "full",
        "yes": "full",
        "selective": "selective",
        "selective-op": "operators",
    }
    if told in words:
        return replace(setup, recompute=words[told])
    if setup.tensor * setup.pipeline == 1 and memory(setup).state > setup.device.memory_bytes:
        setup = replace(setup, sharding="weights")  # nothing else splits the model
    candidate = replace(setup, recompute="none")
    over = memory(candidate).total - setup.device.memory_bytes
    if over <= 0:
        return candidate
    candidate = replace(setup, recompute="full")
    saved = over + setup.device.memory_bytes - memory(candidate).total
    return replace(candidate, recomputed_layers=min(1.0, over / saved) if saved > 0 else 1.0)


def convention(text: str) -> Convention:
    """Which FLOP a publication counts."""
    lower = text.lower()
    if "hardware" in lower:
        return "hardware"
    if "non-causal" in lower or "foundry" in lower:
        return "six n"
    if "bridge" in lower or "nemo" in lower:
        return "causal"
    return "megatron"


def _measured_seconds(cells: Mapping[str, str], setup: Setup) -> float | None:
    """Of a step: as printed, or from tokens, or from FLOP/s as the publication counts them."""
    if (seconds := _number(cells, "iter_s")) is not None:
        return seconds
    if (rate := _number(cells, "tokens_per_s_per_gpu")) is not None:
        return setup.tokens / (rate * setup.gpus)
    text = " ".join(cells.get(key, "") for key in ("source", "notes"))
    flops = step_flops(
        convention(text),
        setup.architecture,
        setup.vocabulary,
        setup.sequence_length,
        setup.global_batch,
    )
    if (tera := _number(cells, "tflops_per_gpu")) is not None:
        return flops / (tera * 1e12 * setup.gpus)
    if (share := _number(cells, "mfu")) is not None:
        number: Number = "fp8" if "fp8 peak" in text.lower() else "half"
        share = share / 100 if share > 1 else share
        return flops / (share * setup.device.peak(number) * setup.gpus)
    return None


def _measured_memory(notes: str) -> float | None:
    told = re.search(r"\bmem(?:ory)?_gi?b=(\d+(?:\.\d+)?)", notes)
    return None if told is None else float(told[1])


def _ran_out(cells: Mapping[str, str]) -> bool:
    notes = cells.get("notes", "")
    if any(cells.get(key, "").strip() for key in ("iter_s", "tokens_per_s_per_gpu", "mfu")):
        return False
    return re.search(r"\bOOM\b|out of memory", notes) is not None
