"""What ranks run in the tests of T5."""

from pathlib import Path
from typing import Any

from llmscale.clusters.base import Job
from llmscale.parallel.layout import Layout
from tests import ranks
from tests.training.programs import _export


def huggingface_round_trip(job: Job, rank: int, rendezvous: str) -> None:
    """A Hugging Face folder into a layout: logits, and out again."""
    given = ranks.settings(job)
    layout = Layout(**given["layout"])
    with ranks.joined(job, rank, rendezvous, layout) as world:
        import torch
        from megatron.core import parallel_state
        from safetensors.torch import save_file

        from llmscale.models.huggingface import HuggingFaceWeights, export, fill
        from llmscale.models.huggingface_config import read_architecture, read_vocabulary
        from llmscale.training.batches import spans_alone
        from llmscale.training.megatron_engine import MegatronEngine
        from llmscale.training.settings import Optimizer

        source = Path(given["source"])
        architecture, vocabulary = read_architecture(source), read_vocabulary(source)
        engine = MegatronEngine(architecture, vocabulary, layout, Optimizer(learning_rate=1e-4))
        fill(engine.chunks, architecture, vocabulary, HuggingFaceWeights(source))
        batch = spans_alone(torch.tensor(given["inputs"]), torch.tensor(given["targets"]))
        logits = engine.logits(batch)
        first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        if logits is not None and first and parallel_state.get_tensor_model_parallel_rank() == 0:
            save_file({"logits": logits.contiguous()}, given["file"])
        _export(engine, Path(given["exported"]), world.first, export)
        ranks.answer(job, rank, "done")


def train(job: Job, rank: int, rendezvous: str) -> None:
    """Some steps from the seed, or from another layout's checkpoint; then one, and the model."""
    given: Any = ranks.settings(job)
    layout = Layout(**given["layout"])
    with ranks.joined(job, rank, rendezvous, layout) as world:
        import numpy as np
        from megatron.core import parallel_state

        from llmscale.data.samples import rank_places
        from llmscale.models.architecture import Architecture
        from llmscale.models.huggingface import export, fill
        from llmscale.training.checkpoint import Checkpoints, TrainingState
        from llmscale.training.megatron_engine import MegatronEngine
        from llmscale.training.objectives import Spans
        from llmscale.training.settings import Optimizer

        architecture = Architecture(**given["model"])
        optimizer = Optimizer(
            learning_rate=1e-3, epsilon=1e-5, distributed=given.get("distributed", False)
        )
        engine = MegatronEngine(
            architecture, 301, layout, optimizer, recompute=given.get("recompute", "none")
        )
        objective = Spans(
            sequence_length=32, sentinels=tuple(range(2, 12)), padding=1, end=0, seed=7
        )
        checkpoints = Checkpoints(Path(given["checkpoints"]), 9)
        start = given.get("start", 0)
        if start:
            checkpoints.load(engine, start)
        else:
            fill(engine.chunks, architecture, 301, 5)
        text = np.random.default_rng(3).integers(12, 301, (100, objective.sample_length(32) + 1))
        results = []
        for step in range(start, given["steps"]):
            places = rank_places(
                consumed=8 * step,
                global_batch=8,
                micro_batch=2,
                data_rank=parallel_state.get_data_parallel_rank(),
                data_ranks=parallel_state.get_data_parallel_world_size(),
            )
            batches = [objective.batch(text[own], own, world.device) for own in places]
            result = engine.train_step(batches, 1e-3)
            results.append([result.loss, result.gradient_norm])
            if step + 1 == given.get("save"):
                checkpoints.save(engine, TrainingState(step=step + 1))
        _export(engine, Path(given["exported"]), world.first, export)
        ranks.answer(job, rank, results)
