"""How long training waits for a checkpoint, saved at once or in the background.

One rank, the 23 M Llama shape of benchmarks/pretrain.py with AdamW's state (about 270 MB).

    python benchmarks/checkpoint.py
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from pretrain import BATCH, LENGTH, SHAPE, VOCABULARY, windows

SAVES = 5


def main() -> None:
    """Prints the seconds the training thread was held up, by each way."""
    import llmscale.quiet  # noqa: F401
    from llmscale.models.architecture import Architecture
    from llmscale.models.huggingface import fill
    from llmscale.parallel.layout import Layout
    from llmscale.parallel.world import joined_world, process_groups
    from llmscale.training.checkpoint import Checkpoints, TrainingState
    from llmscale.training.megatron_engine import MegatronEngine
    from llmscale.training.objectives import Causal
    from llmscale.training.settings import Optimizer

    with (
        tempfile.TemporaryDirectory() as folder,
        joined_world(rank=0, ranks=1, rendezvous=f"file://{folder}/store", device="cpu") as world,
        process_groups(Layout(), seed=0),
    ):
        architecture = Architecture(**SHAPE)
        engine = MegatronEngine(architecture, VOCABULARY, Layout(), Optimizer(learning_rate=1e-4))
        fill(engine.chunks, architecture, VOCABULARY, 0)
        engine.train_step([Causal().batch(windows(0), [], world.device)], 1e-4)
        checkpoints = Checkpoints(Path(folder, "checkpoints"), keep=1)
        waited: dict[str, list[float]] = {"at once": [], "in the background": []}
        for number in range(1, 2 * SAVES + 1):
            state = TrainingState(step=number)
            begun = time.perf_counter()
            if number % 2:
                checkpoints.save(engine, state)
                waited["at once"].append(time.perf_counter() - begun)
            else:
                checkpoints.begin(engine, state)
                held = time.perf_counter() - begun
                engine.train_step([Causal().batch(windows(number), [], world.device)], 1e-4)
                begun = time.perf_counter()
                checkpoints.finish()
                waited["in the background"].append(held + time.perf_counter() - begun)
    print(f"{BATCH} x {LENGTH} tokens a step; {SAVES} saves each way; medians")
    for name, seconds in waited.items():
        print(f"{name:<20} training waited {statistics.median(seconds):.2f} s")


if __name__ == "__main__":
    main()
