"""What a row of a published table was run as: its setup.

What a row leaves out is taken as its kind of publication has it; each such choice is here.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmscale.models.architecture import Architecture
from llmscale.planning.cells import Unpredictable, needed, positive, whole
from llmscale.planning.hardware import Device, Number, find_device
from llmscale.planning.memory import memory
from llmscale.planning.setup import Kernels, Overlap, Recompute, Setup, Sharding
from llmscale.settings import divisors

OUTSIDE_THE_PIPELINE = re.compile(r"\blora\b", re.IGNORECASE)
DEFAULT_VOCABULARY = 51200
MOST_STAGES, MOST_LAYERS = 128, 1024
JEAN_ZAY_NETWORK = 4 * 100e9 / 8 / 8
"""Bytes a second of a GPU: four 100 Gb/s ports of Omni-Path a node of 8 A100 (BLOOM's
tr11-176B-ml/README.md, "Hardware")."""


def row_setup(cells: Mapping[str, str]) -> Setup:
    """The setup of a row.

    Raises:
        Unpredictable: if the row lacks what a prediction needs.
        RecipeError: if its device is not known.
    """
    text = " ".join(cells.get(key, "") for key in ("source", "table", "notes"))
    if OUTSIDE_THE_PIPELINE.search(text):
        raise Unpredictable("trains adapters, not all weights")
    if not cells.get("gpu", "").strip():
        raise Unpredictable("gpu: empty")
    device = _device(cells["gpu"], text)
    gpus, length = needed(cells, "gpus", "seq")
    tensor, pipeline, context = _degrees(cells, text, device, gpus)
    data = gpus // (tensor * pipeline * context)
    micro_batch, global_batch = _batch(cells, text, pipeline, data)
    vocabulary = whole(cells, "vocab", DEFAULT_VOCABULARY)
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
        expert=whole(cells, "ep", 1),
        data=data,
    )
    chunks = _virtual_pipeline(cells, text, base)
    return _with_recompute(
        cells, _with_software(cells, text, replace(base, virtual_pipeline=chunks))
    )


def _degrees(
    cells: Mapping[str, str], text: str, device: Device, gpus: int
) -> tuple[int, int, int]:
    """Tensor, pipeline and context; beyond one domain only FSDP may leave both out."""
    told = positive(cells, "tp") or positive(cells, "pp") or _sharding(text.lower()) == "weights"
    if not told and gpus > device.domain:
        raise Unpredictable("tp, pp: empty")
    tensor, pipeline, context = (whole(cells, key, 1) for key in ("tp", "pp", "cp"))
    if tensor * pipeline * context > gpus or pipeline > MOST_STAGES:
        raise Unpredictable(f"tp x pp x cp: {tensor} x {pipeline} x {context} on {gpus} gpus")
    return tensor, pipeline, context


def _device(name: str, text: str) -> Device:
    """With the network that the publication tells of.

    BLOOM's nodes hung unless launches blocked (chronicles-prequel.md, "dealing with JZ hanging").
    """
    device = find_device(name)
    if text.startswith("bigscience-workshop/"):
        return replace(device, network_bandwidth=JEAN_ZAY_NETWORK, blocking=True)
    told = re.search(r"(\d{2,5}) ?Gb(?:ps|/s|it/s) node", text)
    if told is None:
        return device
    return replace(device, network_bandwidth=float(told[1]) * 1e9 / 8 / 8)


def _batch(cells: Mapping[str, str], text: str, pipeline: int, data: int) -> tuple[int, int]:
    """Of a micro-batch, and of a step.

    Where no micro-batch is printed: torchtitan cuts a rank's batch into as many as there are
    stages; others are taken at one sample.
    """
    micro, whole = positive(cells, "micro_batch"), positive(cells, "global_batch")
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
    if (printed := positive(cells, "vpp")) is not None:
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
    (hidden,) = needed(cells, "hidden")
    printed = positive(cells, "params_b")
    heads = whole(cells, "heads", 0) or _usual_heads(hidden, tensor)
    shape: dict[str, Any] = {
        "hidden_size": hidden,
        "attention_heads": heads,
        "key_value_heads": whole(cells, "kv_heads", heads),
        "head_size": max(1, hidden // heads),
        "ffn_size": whole(cells, "ffn", 4 * hidden),
        "sequence_length": length,
    }
    layers = positive(cells, "layers")
    if layers is None and printed is None:
        raise Unpredictable("layers, params_b: empty")
    if max(layers or 0, heads) > MOST_LAYERS:
        raise Unpredictable(f"layers, heads: above {MOST_LAYERS:,}")
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
        return gated if positive(cells, "kv_heads") else plain
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
    count = max(1, round((parameters - outer) / layer / pipeline)) * pipeline
    if count > MOST_LAYERS:
        raise Unpredictable(f"params_b: would be {count:,} layers")
    return count


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
