"""Small runs of the shipped quickstart over two nodes of a test cluster, and what they left."""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.daemons import PATIENCE
from tests.small import SMALL_MODEL

STEPS = 40
TWO_NODES = [
    "cluster.nodes=2",
    "cluster.ranks_per_node=1",
    "stages.pretrain.parallel={tensor: 2}",
]
ON_ONE = ["cluster.ranks_per_node=2", "stages.pretrain.parallel={tensor: 2}"]
SMALL = [
    *SMALL_MODEL,
    f"stages.pretrain.steps={STEPS}",
    "stages.pretrain.batch={global: 8, micro: 4}",
    "stages.pretrain.checkpoint={every: 8, keep: 2}",
]
UP_TO_TRAINING = ["--stages", "corpus,tokenizer,pretrain"]

Curve = list[tuple[int, float, float]]


def curve(run: Path) -> Curve:
    """Step, loss and gradient norm of each step."""
    lines = (run / "pretrain" / "metrics.jsonl").read_text().splitlines()
    return [
        (line["step"], line["loss"], line["gradient_norm"])
        for line in map(json.loads, lines)
        if "loss" in line
    ]


def steps(run: Path) -> int:
    """How many steps are logged so far."""
    file = run / "pretrain" / "metrics.jsonl"
    return len(curve(run)) if file.exists() else 0


def until(true: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def copied(prepared: Path, run: Path) -> Path:
    """A run folder whose corpus and tokenizer are finished."""
    return Path(shutil.copytree(prepared, run))


def with_tokens(prepared: Path, trained: Path, run: Path) -> Path:
    """The same, with the tokens that another run of the recipe made."""
    shutil.copytree(trained / "pretrain" / "tokens", run / "pretrain" / "tokens")
    return Path(shutil.copytree(prepared, run, dirs_exist_ok=True))


def rank_process(run: Path, rank: int) -> psutil.Process:
    """A training rank's process, wherever on this machine its node is."""
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if "llmscale.rank_process" not in command or str(run) not in command:
            continue
        if not re.search(r'"name": "train"', command) or "torch.distributed" in command:
            continue
        own = process.environ()
        told = (own.get(name) for name in ("LLMSCALE_RANK", "RANK", "SLURM_PROCID"))
        if next(filter(None, told), None) == str(rank):
            return process
    raise AssertionError(f"rank {rank} of {run} does not run")


def history(run: Path) -> list[dict[str, Any]]:
    """Every start of ranks and its end."""
    file = run / "history.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def mishaps(run: Path) -> int:
    """How many starts did not finish."""
    return sum(e["event"] == "end" and e["outcome"] != "finished" for e in history(run))
