"""Speed of fine-tuning and of reward training, beside TRL's SFTTrainer and RewardTrainer.

One rank, the same model, records, optimizer, batch and number of threads for both; each trains in a
process of its own, in turns, so that a machine whose speed drifts treats both alike. Figures are
tokens of text a second, without padding, from the third step on; the ratio is the median of rounds.

    python benchmarks/finetune.py MODEL_FOLDER [ROUNDS]
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[1] / "recipes"
BATCH, MICRO, STEPS, WARM_UP, LENGTH = 16, 4, 8, 2, 256
LEARNING_RATE = 1e-5


def pairs() -> list[dict[str, str]]:
    """Sentences of reviews, each beside one whose mean rating differs by 1 at least."""
    lines = (RECIPES / "reviews" / "ratings.jsonl").read_text(encoding="utf-8").splitlines()
    rated = [json.loads(line) for line in lines]
    found = []
    for one, other in zip(rated[::2], rated[1::2], strict=False):
        best, worst = sorted((one, other), key=lambda record: -record["score"])
        if best["score"] - worst["score"] >= 1:
            found.append({"chosen": best["response"], "rejected": worst["response"]})
    return found[: BATCH * STEPS]


def questions() -> list[dict[str, Any]]:
    """Instructions and their answers."""
    lines = (
        (RECIPES / "instructions" / "shakespeare.jsonl").read_text(encoding="utf-8").splitlines()
    )
    return [json.loads(line) for line in lines][: BATCH * STEPS]


def turns(record: dict[str, Any]) -> dict[str, Any]:
    """A record of instructions as TRL has it."""
    asked = record["instruction"] + (f"\n\n{record['input']}" if record.get("input") else "")
    return {
        "prompt": [{"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": record["output"]}],
    }


def ours(kind: str, model: str, folder: Path) -> float:
    """Tokens a second of a stage on one rank."""
    from llmscale.recipe.yaml_places import write_yaml

    (folder / "data.jsonl").write_text(
        "\n".join(map(json.dumps, questions() if kind == "finetune" else pairs()))
    )
    stage = {
        "kind": kind,
        "start_from": model,
        "data": {"all": {"path": "data.jsonl"}},
        "malformed": "skip",
        "validation_fraction": 0.0,
        "sequence_length": LENGTH,
        "batch": {"global": BATCH, "micro": MICRO},
        "optimizer": {
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "beta2": 0.999,
            "weight_decay": 0.0,
        },
        "steps": STEPS,
        "checkpoint": {"every": STEPS},
    }
    recipe = {
        "name": "speed",
        "seed": 1,
        "cluster": {"on": "local", "ranks_per_node": 1, "device": "cpu"},
        "stages": {"tuned": stage},
    }
    (folder / "recipe.yaml").write_text(write_yaml(recipe))
    command = [sys.executable, "-m", "llmscale", "run", str(folder / "recipe.yaml")]
    subprocess.run(
        [*command, "--run-dir", str(folder / "run")], check=True, stderr=subprocess.DEVNULL
    )
    lines = (folder / "run" / "tuned" / "metrics.jsonl").read_text().splitlines()
    steps = [one for one in map(json.loads, lines) if "step_seconds" in one]
    tokens = steps[-1]["tokens"] - steps[WARM_UP - 1]["tokens"]
    return tokens / sum(one["step_seconds"] for one in steps[WARM_UP:])


def theirs(kind: str, model: str, folder: Path) -> float:
    """Tokens a second of TRL's trainer."""
    command = [sys.executable, __file__, "--trl", kind, model, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return float(done.stdout.splitlines()[-1])


def trl_worker(kind: str, model: str, folder: str) -> None:
    """Trains by TRL; prints tokens a second of text from the third step on."""
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    marks: list[float] = []
    seen: list[int] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_arguments: Any, **_options: Any) -> None:
            marks.append(time.perf_counter())
            seen.append(counted[0])

    counted = [0]
    options: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": BATCH // MICRO,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_length": LENGTH,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer: Any
    if kind == "finetune":
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=SFTConfig(**options),
            train_dataset=Dataset.from_list([turns(one) for one in questions()]),
            processing_class=tokenizer,
            callbacks=[Watch()],
        )
    else:
        scorer = AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=1, dtype=torch.float32
        )
        trainer = RewardTrainer(
            model=scorer,
            args=RewardConfig(**options),
            train_dataset=Dataset.from_list(pairs()),
            processing_class=tokenizer,
            callbacks=[Watch()],
        )
    step = trainer.training_step

    def counting(model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        counted[0] += int(inputs["attention_mask"].sum())
        return step(model, inputs, *rest)

    trainer.training_step = counting
    trainer.train()
    print((seen[-1] - seen[WARM_UP - 1]) / (marks[-1] - marks[WARM_UP - 1]))


def main(model: str, rounds: int) -> None:
    """Prints a line for each kind of training."""
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    for kind in ("finetune", "reward"):
        found: list[tuple[float, float]] = []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
                found.append((ours(kind, model, Path(one)), theirs(kind, model, Path(other))))
        own, peer = (statistics.median(side) for side in zip(*found, strict=True))
        ratio = statistics.median(one / other for one, other in found)
        print(
            f"{kind}: llmscale {own:,.1f} tokens/s, TRL {peer:,.1f} tokens/s, ratio {ratio:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1] == "--trl":
        trl_worker(*sys.argv[2:])
    else:
        main(str(Path(sys.argv[1]).absolute()), int(sys.argv[2]) if len(sys.argv) > 2 else 3)
