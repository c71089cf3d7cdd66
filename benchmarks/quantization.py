"""Schemes of quantization on SmolLM2-135M, ours and other tools', side by side.

    python benchmarks/quantization.py MODEL [--schemes A,B] [--tokens 32768] [--peers FOLDER]

MODEL is the model's folder, as ``llmscale import SmolLM2-135M.gguf --out MODEL`` makes it. The
weights of that file lie on a grid of 4 bits, which rounding would hit exactly, so they are taken
off it first: columns are multiplied and what comes before them is divided, by factors between 0.74
and 1.35, which leaves the model's function as it is. Calibrated on some of Shakespeare's plays and
measured on others.

With ``--peers`` the other tools of ``quantization_peers.py`` run on the same model with the same
tokens, each in an environment of its own, which is made in FOLDER unless it is there.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmscale.evaluation.models import load_model
from llmscale.quantization.blocks import BlockwiseModel
from llmscale.quantization.calibration import calibration_windows
from llmscale.quantization.compare import compare, text_windows
from llmscale.quantization.families import BEFORE, divided_outputs, shares
from llmscale.quantize_command import table

PLAYS = Path(__file__).parents[1] / "recipes" / "texts" / "shakespeare"
MEASURED_ON = ("hamlet", "macbeth", "tempest")
SCHEMES = (
    "int8-weight,int8-dynamic,int8-smoothquant,int8-static,fp8,int4-weight,int4-gptq,int4-awq,"
    "int4-awq-gptq,int4-rotated-gptq,mixed"
)
WINDOW = 1024
LARGEST_LOG_FACTOR = 0.3
TOGETHER = {
    "self_attn.q_proj": ("self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_proj": ("mlp.up_proj",),
}


@dataclass(frozen=True)
class Peer:
    """Another tool: what its environment holds, and its schemes."""

    packages: Sequence[str]
    schemes: Sequence[str]
    alone: Sequence[str] = ()
    """Packages installed without what they ask for, which would be another torch."""
    environment: dict[str, str] = field(default_factory=dict)


TORCH = "torch==2.13.0"
TRANSFORMERS = ("transformers==5.23.0", "accelerate==1.15.0")
PEERS = {
    "bitsandbytes": Peer(
        [TORCH, *TRANSFORMERS, "bitsandbytes==0.50.2"], ["llm-int8", "nf4", "fp4"]
    ),
    "torchao": Peer(
        [TORCH, *TRANSFORMERS, "torchao==0.18.0"], ["int8-weight", "int8-dynamic", "int4-weight"]
    ),
    "optimum-quanto": Peer(
        [TORCH, *TRANSFORMERS, "optimum-quanto==0.2.7"], ["int8-weight", "int4-weight"]
    ),
    "llm-compressor": Peer(
        [TORCH, "llmcompressor==0.14.0"],
        ["int8-dynamic", "fp8", "int4-weight", "int4-gptq", "int4-awq"],
    ),
    "gptqmodel": Peer(
        [
            *(TORCH, *TRANSFORMERS, "torchao==0.18.0", "datasets", "defuser", "device-smi"),
            *("dill", "logbar", "maturin", "ninja", "pillow", "protobuf", "pypcre", "requests"),
            *("threadpoolctl", "tokenicer"),
        ],
        ["int4-gptq"],
        alone=["gptqmodel==7.7.0"],
        environment={"GPTQMODEL_CPU_WORKERS": "2"},
    ),
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


def python_of(tool: str, folder: Path) -> Path:
    """The interpreter of a tool's environment, which is made unless it is there whole."""
    peer, home = PEERS[tool], folder / tool
    python = home / "bin" / "python"
    whole = home / "whole"
    if not whole.exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, *peer.packages], check=True)
        if peer.alone:
            subprocess.run([*install, "--no-deps", *peer.alone], check=True)
        whole.touch()
    return python


def peer_rows(folder: Path, model: Path, given: Path) -> list[dict[str, Any]]:
    """A row for each scheme of each other tool; one that fails is told and left out."""
    rows = []
    for tool, peer in PEERS.items():
        python = python_of(tool, folder)
        for scheme in peer.schemes:
            script = Path(__file__).with_name("quantization_peers.py")
            done = subprocess.run(
                [python, script, tool, scheme, model, given],
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": "", **peer.environment},
            )
            if done.returncode != 0:
                causes = [line for line in done.stderr.splitlines() if "Error" in line]
                cause = causes[-1] if causes else f"exit {done.returncode}"
                print(f"{tool} {scheme} failed: {cause}", file=sys.stderr)
                continue
            rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


@torch.no_grad()
def write_given(
    file: Path, folder: Path, measured: list[Path], others: list[Path], tokens: int
) -> None:
    """Writes what other tools are given: our own windows, and the model's likeliest tokens."""
    model, tokenizer = load_model(folder)
    windows_ns = text_windows(
        (one.read_text(encoding="utf-8") for one in measured), tokenizer, WINDOW
    )
    texts = (one.read_text(encoding="utf-8") for one in others)
    blockwise = BlockwiseModel(folder)
    layers = [blockwise.model.get_parameter(f"{name}.weight") for name in blockwise.layers()]
    likeliest = [
        model(input_ids=one[None]).logits[0, :-1].argmax(-1).tolist() for one in windows_ns
    ]
    given = {
        "calibration": calibration_windows(texts, tokenizer, tokens, WINDOW, "plays").tolist(),
        "measured_on": windows_ns.tolist(),
        "likeliest": likeliest,
        "layers": sum(weight.numel() for weight in layers),
    }
    file.write_text(json.dumps(given), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--peers", type=Path, help="a folder for other tools' environments")
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
            window=WINDOW,
        )
        if asked.peers:
            given = Path(scratch) / "given.json"
            write_given(given, moved, measured, others, asked.tokens)
            rows += [{"divergence": None, **row} for row in peer_rows(asked.peers, moved, given)]
    print(table(rows))
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
