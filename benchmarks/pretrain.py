"""Pretraining speed on one rank and one thread, beside a plain transformers loop.

The same 23 M Llama shape, batch and data for both, fp32, AdamW, gradient clipping at 1. Each
trainer is a process of its own; they take steps in turns, so that a machine whose speed
drifts treats both alike. Figures are medians; the ratio is the median of paired ratios.

    python benchmarks/pretrain.py [STEPS]
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

BATCH, LENGTH, VOCABULARY = 4, 512, 16384
SHAPE = {
    "layers": 8,
    "hidden_size": 384,
    "attention_heads": 6,
    "ffn_size": 1280,
    "sequence_length": LENGTH,
    "tied_embeddings": True,
}
LEARNING_RATE = 3e-4
WARM_UP = 2
TRAINERS = ("transformers", "transformers, freed memory kept", "llmscale")


def windows(step: int):
    """A global batch: random tokens, the same for every trainer."""
    import numpy as np

    return np.random.default_rng(step).integers(0, VOCABULARY, (BATCH, LENGTH + 1))


def transformers_trainer(keep_memory: bool) -> Callable[[int], float]:
    """The loop a user of transformers writes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmscale.parallel.memory import keep_freed_memory

    if keep_memory:
        keep_freed_memory()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=SHAPE["hidden_size"],
        intermediate_size=SHAPE["ffn_size"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["attention_heads"],
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)

    def step(number: int) -> float:
        whole = torch.from_numpy(windows(number))
        tokens, labels = whole[:, :-1].contiguous(), whole[:, 1:].contiguous()
        loss = model(input_ids=tokens, labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def llmscale_trainer(rendezvous: str) -> Callable[[int], float]:
    """The engine as a training rank has it."""
    from contextlib import ExitStack

    import llmscale.quiet  # noqa: F401
    from llmscale.models.architecture import Architecture
    from llmscale.models.huggingface import fill
    from llmscale.parallel.layout import Layout
    from llmscale.parallel.world import joined_world, process_groups
    from llmscale.training.megatron_engine import MegatronEngine
    from llmscale.training.objectives import Causal
    from llmscale.training.settings import Optimizer

    stack = ExitStack()
    world = stack.enter_context(joined_world(rank=0, ranks=1, rendezvous=rendezvous, device="cpu"))
    stack.enter_context(process_groups(Layout(), seed=0))
    architecture = Architecture(**SHAPE)
    optimizer = Optimizer(learning_rate=LEARNING_RATE, schedule="constant")
    engine = MegatronEngine(architecture, VOCABULARY, Layout(), optimizer)
    fill(engine.chunks, architecture, VOCABULARY, 0)

    def step(number: int) -> float:
        batch = Causal().batch(windows(number), [], world.device)
        return engine.train_step([batch], LEARNING_RATE).loss

    step.until = stack.pop_all()  # type: ignore[attr-defined]
    return step


def worker(name: str) -> None:
    """Takes a step for each number on standard input; answers seconds and loss."""
    import torch

    if name == "llmscale":
        with tempfile.TemporaryDirectory() as folder:
            step = llmscale_trainer(f"file://{folder}/store")
    else:
        step = transformers_trainer(keep_memory="kept" in name)
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        begun = time.perf_counter()
        loss = step(int(line))
        print(json.dumps([time.perf_counter() - begun, loss]), flush=True)


def matrix_product_peak() -> float:
    """FLOP/s of one thread's best fp32 matrix product of 1,024 rows and columns."""
    import torch

    torch.set_num_threads(1)
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(10):
        begun = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - begun)
    return 2.0 * 1024**3 / best


def main(steps: int) -> None:
    """Alternates the trainers and prints a line each."""
    from llmscale.models.architecture import Architecture

    processes = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in TRAINERS
    }
    for process in processes.values():
        assert process.stdout and process.stdout.readline().strip() == "ready"
    peak = matrix_product_peak()
    seconds: dict[str, list[float]] = {name: [] for name in TRAINERS}
    for number in range(steps + WARM_UP):
        for name in TRAINERS if number % 2 == 0 else reversed(TRAINERS):
            process = processes[name]
            assert process.stdin and process.stdout
            process.stdin.write(f"{number}\n")
            process.stdin.flush()
            elapsed, _loss = json.loads(process.stdout.readline())
            if number >= WARM_UP:
                seconds[name].append(elapsed)
    for process in processes.values():
        process.terminate()
    flops = Architecture(**SHAPE).flops_per_sample(VOCABULARY, LENGTH) / LENGTH
    print(f"fp32 matrix-product peak, one thread: {peak / 1e9:.0f} GFLOP/s; {steps} steps each")
    base = seconds[TRAINERS[0]]
    for name, taken in seconds.items():
        rate = BATCH * LENGTH / statistics.median(taken)
        ratio = statistics.median(b / t for b, t in zip(base, taken, strict=True))
        share = rate * flops / peak
        print(f"{name:<34} {rate:6.0f} tokens/s  {share:5.0%} of peak  {ratio:.2f}x")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
