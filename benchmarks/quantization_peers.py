"""One scheme of another tool on one model, measured as ours are: a JSON object on the last line.

    PYTHON quantization_peers.py TOOL SCHEME MODEL WINDOWS.json

``benchmarks/quantization.py`` runs it in the tool's own environment, which has no llmscale. The
file has windows of tokens to calibrate with and to measure on, and what the model itself says.
"""

import io
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

GROUP_SIZE = 64
DECODED_TOKENS = 32
Windows = list[list[int]]


def loaded(folder: str, **how: Any) -> Any:
    """The model through Transformers, in bf16."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **how).eval()


def bitsandbytes(scheme: str, folder: str, _: Windows) -> Any:
    """NF4, FP4 and LLM.int8()."""
    from transformers import BitsAndBytesConfig

    how: dict[str, Any] = {"load_in_8bit": True}
    if scheme != "llm-int8":
        how = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": scheme,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    return loaded(folder, quantization_config=BitsAndBytesConfig(**how), device_map={"": "cpu"})


def torchao(scheme: str, folder: str, _: Windows) -> Any:
    """Weights, or weights and inputs, in integers."""
    from torchao import quantization as ao

    model = loaded(folder)
    config = {
        "int8-weight": lambda: ao.Int8WeightOnlyConfig(),
        "int8-dynamic": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
        "int4-weight": lambda: ao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=ao.granularity.PerGroup(GROUP_SIZE)
        ),
    }[scheme]()
    ao.quantize_(model, config, filter_fn=is_inner)
    return model


def is_inner(module: Any, name: str) -> bool:
    """Whether it is a linear layer within a block."""
    return isinstance(module, torch.nn.Linear) and "lm_head" not in name


def quanto(scheme: str, folder: str, _: Windows) -> Any:
    """Weights in 8 or 4 bits."""
    from optimum import quanto as library

    model = loaded(folder)
    weights = {"int8-weight": library.qint8, "int4-weight": library.qint4}[scheme]
    library.quantize(model, weights=weights, exclude="lm_head")
    library.freeze(model)
    return model


def llmcompressor(scheme: str, folder: str, calibration: Windows) -> Any:
    """Round to nearest, GPTQ and AWQ, by its one-shot call."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    model = loaded(folder)
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": scheme != "int4-awq",
        "strategy": "group",
        "group_size": GROUP_SIZE,
    }
    four = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    inner = {"targets": "Linear", "ignore": ["lm_head"]}
    if scheme == "int4-awq":
        from llmcompressor.modifiers.awq import AWQModifier

        # It pins memory for an accelerator, and fails where there is none.
        torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]
        recipe = AWQModifier(ignore=["lm_head"], **four)
    elif scheme == "int4-gptq":
        recipe = GPTQModifier(ignore=["lm_head"], **four)
    elif scheme == "int4-weight":
        recipe = QuantizationModifier(ignore=["lm_head"], **four)
    else:
        named = {"int8-dynamic": "W8A8", "fp8": "FP8_DYNAMIC"}[scheme]
        recipe = QuantizationModifier(scheme=named, **inner)
    how: dict[str, Any] = {}
    if scheme in ("int4-awq", "int4-gptq"):
        rows = [{"input_ids": one, "attention_mask": [1] * len(one)} for one in calibration]
        how = {
            "dataset": Dataset.from_list(rows),
            "max_seq_length": len(calibration[0]),
            "num_calibration_samples": len(calibration),
        }
    oneshot(model=model, recipe=recipe, **how)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, save_compressed=True)
        return loaded(scratch)


def gptqmodel(scheme: str, folder: str, calibration: Windows) -> Any:
    """GPTQ, symmetric, with the library's other defaults."""
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=GROUP_SIZE, sym=True)
    model = GPTQModel.load(folder, config, device="cpu")
    rows = [{"input_ids": one, "attention_mask": [1] * len(one)} for one in calibration]
    model.quantize(rows, batch_size=1)
    with tempfile.TemporaryDirectory() as scratch:
        model.save(scratch)
        stored = GPTQModel.load(scratch, device="cpu")
    return stored.model


TOOLS: dict[str, Callable[[str, str, Windows], Any]] = {
    "bitsandbytes": bitsandbytes,
    "gptqmodel": gptqmodel,
    "llm-compressor": llmcompressor,
    "optimum-quanto": quanto,
    "torchao": torchao,
}


@torch.no_grad()
def measured(model: Any, windows: Windows, likeliest: Windows) -> dict[str, float]:
    """Perplexity over windows, and how often the likeliest next token is the original's."""
    nats = agreeing = scored = 0.0
    for window, expected in zip(windows, likeliest, strict=True):
        tokens = torch.tensor([window])
        logits = model(input_ids=tokens).logits[0, :-1].float()
        nats += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        agreeing += int((logits.argmax(-1) == torch.tensor(expected)).sum())
        scored += len(expected)
    return {"perplexity": math.exp(min(nats / scored, 700.0)), "agreement": agreeing / scored}


def decoding_speed(model: Any, window: list[int]) -> float:
    """Greedy tokens a second, one text at a time."""
    prompt = torch.tensor([window[:32]])
    how = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    model.generate(prompt, max_new_tokens=2, **how)
    begun = time.perf_counter()
    model.generate(prompt, max_new_tokens=DECODED_TOKENS, min_new_tokens=DECODED_TOKENS, **how)
    return DECODED_TOKENS / (time.perf_counter() - begun)


def sizes(model: Any, layers: int) -> dict[str, float]:
    """Megabytes of all tensors as torch saves them, and bits a weight of the blocks' layers.

    Args:
        layers: the weights of those layers; all other numbers count as 16 bits.
    """
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    stored = buffer.tell()
    others = {
        parameter.data_ptr(): 2 * parameter.numel()
        for name, parameter in model.named_parameters()
        if "norm" in name or "embed_tokens" in name
    }
    return {
        "megabytes": round(stored / 1e6, 2),
        "bits_per_weight": round(8 * (stored - sum(others.values())) / layers, 3),
    }


def main() -> None:
    tool, scheme, folder, file = sys.argv[1:]
    given = json.loads(Path(file).read_text(encoding="utf-8"))
    torch.manual_seed(0)
    begun = time.monotonic()
    model = TOOLS[tool](scheme, folder, given["calibration"])
    row = {"scheme": f"{tool} {scheme}", "quantize_seconds": round(time.monotonic() - begun, 2)}
    row |= sizes(model, given["layers"])
    row |= measured(model, given["measured_on"], given["likeliest"])
    row["decode_tokens_per_second"] = round(decoding_speed(model, given["measured_on"][0]), 2)
    print("\n" + json.dumps(row))


if __name__ == "__main__":
    main()
