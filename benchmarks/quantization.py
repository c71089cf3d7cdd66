"""Schemes of quantization on SmolLM2-135M, ours and other tools', side by side.

    python benchmarks/quantization.py MODEL [--schemes A,B] [--tokens 32768]
        [--peers FOLDER] [--tools A,B:SCHEME] [--folder FOLDER] [--minutes 30]

MODEL is the model's folder, as ``llmscale import SmolLM2-135M.gguf --out MODEL`` makes it. The
weights of that file lie on a grid of 4 bits, which rounding would hit exactly, so they are taken
off it first: columns are multiplied and what comes before them is divided, by factors between 0.74
and 1.35, which leaves the model's function as it is. Calibrated on some of Shakespeare's plays and
measured on others.

Every scheme has a process of its own (``quantization_tools.py``). With ``--peers`` those of other
tools follow: the same model, tokens and measurement, each tool in an environment of its own, which
is made in FOLDER unless it is there. A row is printed as soon as it is there; a scheme that fails,
or takes more than so many minutes, is told and left out. With ``--folder`` the same call again
measures only what is missing there: use it for one model and one number of tokens.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmscale.artifacts import read_json, write_json
from llmscale.evaluation.models import load_model
from llmscale.quantization.blocks import BlockwiseModel
from llmscale.quantization.calibration import calibration_windows
from llmscale.quantization.compare import text_windows
from llmscale.quantization.families import BEFORE, by_output, divided_outputs, shares
from llmscale.quantize_command import table

PLAYS = Path(__file__).resolve().parents[1] / "recipes" / "texts" / "shakespeare"
MEASURED_ON = ("hamlet", "macbeth", "tempest")
SCHEMES = (
    "int8-weight,int8-dynamic,int8-smoothquant,int8-static,fp8,int4-weight,int4-gptq,"
    "int4-gptq@gptq,int4-awq,int4-awq-gptq,int4-rotated-gptq,mixed"
)
OURS = ("llmscale", "unquantized")
GPTQ_PACKAGES = Path(sys.prefix) / "gptq"
"""What ``make install`` puts there, to load GPTQ's own layout with."""
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait for each other sleep: beside other work, spinning takes ten times as long."""
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
    "llm-compressor": Peer(
        [TORCH, "llmcompressor==0.14.0"],
        ["int4-gptq", "int4-awq", "int4-weight", "int8-dynamic", "fp8"],
    ),
    "bitsandbytes": Peer(
        [TORCH, *TRANSFORMERS, "bitsandbytes==0.50.2"], ["llm-int8", "nf4", "fp4"]
    ),
    "torchao": Peer(
        [TORCH, *TRANSFORMERS, "torchao==0.18.0"], ["int8-weight", "int8-dynamic", "int4-weight"]
    ),
    "optimum-quanto": Peer(
        [TORCH, *TRANSFORMERS, "optimum-quanto==0.2.7"], ["int8-weight", "int4-weight"]
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
            own |= divided_outputs(own, leader, by_output(factors_i, shares_i))
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


def row_of(
    tool: str, scheme: str, python: Path, model: Path, beside: Path, minutes: float
) -> dict[str, Any]:
    """The row of one scheme of one tool, in a process of its own.

    Raises:
        RuntimeError: if it fails, or takes more minutes.
    """
    own = tool in OURS
    environment = {} if own else {"PYTHONPATH": "", **PEERS[tool].environment}
    if scheme.endswith("@gptq"):
        environment = {"PYTHONPATH": str(GPTQ_PACKAGES)}
    script = Path(__file__).resolve().with_name("quantization_tools.py")
    with (beside / f"{tool}-{scheme}.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [python, script, tool, scheme, model, beside],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=beside,
            env={**os.environ, **PATIENT, **environment},
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=60 * minutes)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"took more than {minutes:g} minutes") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        found = [line for line in said.splitlines() if line.startswith("{")]
        if process.returncode == 0 and found:
            return dict(json.loads(found[-1]))
        log.seek(0)
        causes = [line for line in log if "Error" in line]
        raise RuntimeError(causes[-1].strip() if causes else f"exit {process.returncode}")


@torch.no_grad()
def write_given(
    beside: Path, folder: Path, measured: list[Path], others: list[Path], tokens: int
) -> None:
    """Writes what tools are given: our own windows, and what the model itself says of them."""
    model, tokenizer = load_model(folder)
    windows_ns = text_windows(
        (one.read_text(encoding="utf-8") for one in measured), tokenizer, WINDOW
    )
    texts = (one.read_text(encoding="utf-8") for one in others)
    blockwise = BlockwiseModel(folder)
    layers = [blockwise.model.get_parameter(f"{name}.weight") for name in blockwise.layers()]
    logs = [model(input_ids=one[None]).logits[0, :-1].log_softmax(-1).half() for one in windows_ns]
    torch.save(torch.stack(logs), beside / "expected.pt")
    given = {
        "texts": [str(one) for one in others],
        "tokens": tokens,
        "calibration": calibration_windows(texts, tokenizer, tokens, WINDOW, "plays").tolist(),
        "measured_on": windows_ns.tolist(),
        "layers": sum(weight.numel() for weight in layers),
    }
    write_json(beside / "given.json", given)


def jobs(schemes: str, tools: str | None) -> Iterator[tuple[str, str]]:
    """Tools and their schemes in turn, ours first."""
    yield "unquantized", "fp32"
    for scheme in filter(None, schemes.split(",")):
        yield "llmscale", scheme
    for named in PEERS if tools is None else filter(None, tools.split(",")):
        tool, _, one = named.partition(":")
        for scheme in [one] if one else PEERS[tool].schemes:
            yield tool, scheme


def run(asked: argparse.Namespace, beside: Path) -> list[dict[str, Any]]:
    """The rows of all that is asked for, of which some may be there already."""
    measured = [PLAYS / f"{name}.txt" for name in MEASURED_ON]
    others = [file for file in sorted(PLAYS.glob("*.txt")) if file not in measured]
    model = beside / "model"
    if not (beside / "given.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        off_the_grid(asked.model, model)
        write_given(beside, model, measured, others, asked.tokens)
    rows: dict[str, dict[str, Any]] = read_json(beside / "rows.json") or {}
    for tool, scheme in jobs(asked.schemes, asked.tools if asked.peers else ""):
        name = f"{tool} {scheme}"
        if name in rows:
            continue
        try:
            python = (
                Path(sys.executable) if tool in OURS else python_of(tool, asked.peers.absolute())
            )
            row = row_of(tool, scheme, python, model, beside, asked.minutes)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            print(f"{name} failed: {error}", file=sys.stderr, flush=True)
            continue
        rows[name] = {**dict.fromkeys(("quantize_seconds", "own_megabytes")), **row}
        print(json.dumps(rows[name]), file=sys.stderr, flush=True)
        write_json(beside / "rows.json", rows)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--peers", type=Path, help="a folder for other tools' environments")
    parser.add_argument("--tools", help="which of them, as TOOL or TOOL:SCHEME; all by default")
    parser.add_argument("--folder", type=Path, help="where rows are kept, and not made again")
    parser.add_argument("--minutes", type=float, default=30, help="that a scheme may take")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        beside = (asked.folder or Path(scratch)).absolute()
        beside.mkdir(parents=True, exist_ok=True)
        rows = run(asked, beside)
    print(table(rows))
    for row in rows:
        if row["own_megabytes"] is not None:
            print(f"{row['scheme']}: {row['own_megabytes']} MB at most of its own")


if __name__ == "__main__":
    main()
