"""Schemes of quantization on SmolLM2-135M, side by side.

    python benchmarks/quantization.py MODEL [--schemes A,B] [--tokens 32768]

MODEL is the model's folder, as ``llmscale import SmolLM2-135M.gguf --out MODEL`` makes it. The
weights of that file lie on a grid of 4 bits, which rounding would hit exactly, so they are taken
off it first: columns are multiplied and what comes before them is divided, by factors between 0.74
and 1.35, which leaves the model's function as it is. Calibrated on some of Shakespeare's plays and
measured on others.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llmscale.quantization.blocks import BlockwiseModel
from llmscale.quantization.compare import compare
from llmscale.quantization.families import BEFORE, divided_outputs, shares
from llmscale.quantize_command import table

PLAYS = Path(__file__).parents[1] / "recipes" / "texts" / "shakespeare"
MEASURED_ON = ("hamlet", "macbeth", "tempest")
SCHEMES = "int8-weight,int8-dynamic,int8-smoothquant,fp8,int4-weight,int4-gptq,int4-awq,nf4"
LARGEST_LOG_FACTOR = 0.3
TOGETHER = {
    "self_attn.q_proj": ("self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_proj": ("mlp.up_proj",),
}


def off_the_grid(source: Path, target: Path) -> None:
    """Writes the same function with other weights."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    config = BlockwiseModel(source).config
    random = torch.Generator().manual_seed(8)
    for number in range(config.num_hidden_layers):
        prefix = f"model.layers.{number}."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        for leader in BEFORE:
            columns = own[f"{leader}.weight"].shape[1]
            shares_i = shares(leader, config, columns)
            assert shares_i is not None, "the model is a llama"
            logarithms = torch.rand(columns, generator=random) * 2 - 1
            factors_i = (logarithms * LARGEST_LOG_FACTOR).exp()[shares_i]
            own |= divided_outputs(own, leader, factors_i, shares_i)
            for name in (leader, *TOGETHER.get(leader, ())):
                own[f"{name}.weight"] = own[f"{name}.weight"] * factors_i
        tensors |= {f"{prefix}{name}": tensor.contiguous() for name, tensor in own.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    measured = [PLAYS / f"{name}.txt" for name in MEASURED_ON]
    others = [file for file in sorted(PLAYS.glob("*.txt")) if file not in measured]
    with tempfile.TemporaryDirectory() as scratch:
        moved = Path(scratch) / "model"
        off_the_grid(asked.model, moved)
        rows = compare(
            moved,
            asked.schemes.split(","),
            (file.read_text(encoding="utf-8") for file in measured),
            lambda: (file.read_text(encoding="utf-8") for file in others),
            tokens=asked.tokens,
            window=1024,
        )
    print(table(rows))
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
