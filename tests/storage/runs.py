"""Small runs of the shipped quickstart at a URL, as users start them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from llmscale.artifacts import COMPLETE
from llmscale.mirror import Mirror, cached
from llmscale.storage import Storage
from tests.cluster.runs import ON_ONE, SMALL, UP_TO_TRAINING, Curve
from tests.conftest import QUICKSTART, ROOT

CALL = ["run", QUICKSTART, *SMALL, *ON_ONE, *UP_TO_TRAINING]


def started(*arguments: object, **environment: str) -> "subprocess.Popen[str]":
    """A command that was begun."""
    return subprocess.Popen(
        [sys.executable, "-m", "llmscale", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT,
    )


def llmscale(*arguments: object, seconds: float = 240) -> str:
    """A command that ended well; what it said."""
    process = started(*arguments)
    said, complaints = process.communicate(timeout=seconds)
    assert process.returncode == 0, said + complaints
    return said


def put_tokens(local_run: Path, url: str) -> None:
    """Puts to a URL what a run at a path has, but for its training."""
    folder = cached(url, "given")
    ignored = shutil.ignore_patterns("checkpoints", "hf", "metrics.jsonl", "tensorboard", "logs")
    for name in ("corpus", "tokenizer", "pretrain"):
        shutil.copytree(local_run / name, folder / name, ignore=ignored)
    file = folder / "pretrain" / "manifest.json"
    begun = {**json.loads(file.read_text()), "status": "interrupted", "metrics": {}}
    file.write_text(json.dumps(begun))
    mirror = Mirror.of(folder)
    assert mirror is not None
    mirror.push("corpus", "tokenizer", "pretrain")


def curve_at(url: str) -> Curve:
    """Step, loss and gradient norm of each step, from the URL alone."""
    text = Storage(url).read("pretrain/metrics.jsonl") or b""
    lines = [json.loads(line) for line in text.decode().splitlines() if line]
    return [(e["step"], e["loss"], e["gradient_norm"]) for e in lines if "loss" in e]


def whole_steps(url: str) -> list[int]:
    """The steps of the checkpoints that count."""
    return sorted(
        int(name.split("/")[-2].removeprefix("step-"))
        for name in Storage(url).versions("pretrain/checkpoints")
        if name.endswith(f"/{COMPLETE}")
    )


def manifest_at(url: str, stage: str = "pretrain") -> Any:
    """A stage's manifest, from the URL alone."""
    return json.loads(Storage(url).read(f"{stage}/manifest.json") or b"{}")
