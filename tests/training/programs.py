"""What ranks run in the tests of training."""

from pathlib import Path
from typing import Any

from llmscale.clusters.base import Job
from llmscale.parallel.layout import Layout
from tests import ranks


def logits_of_stage(job: Job, rank: int, rendezvous: str) -> None:
    """A training stage's best checkpoint and given tokens to Megatron logits, in a file."""
    from safetensors.torch import save_file

    with ranks.joined(job, rank, rendezvous, Layout()):
        import torch

        from llmscale.artifacts import RunFolder, read_json
        from llmscale.recipe.recipe import read_resolved
        from llmscale.training.batches import tokens_alone
        from llmscale.training.checkpoint import Checkpoints
        from llmscale.training.megatron_engine import MegatronEngine

        given = ranks.settings(job)
        folder = RunFolder(Path(given["run"]))
        stage: Any = read_resolved(folder.recipe_file).stages["pretrain"]
        vocabulary = read_json(folder.path / "pretrain" / "tokens" / "tokens.json")["vocabulary"]
        engine = MegatronEngine(stage.architecture(), vocabulary, Layout(), stage.optimizer)
        checkpoints = Checkpoints(folder.stage("pretrain").checkpoints, 2)
        best = folder.stage("pretrain").manifest()["metrics"]["best_step"]
        checkpoints.load_weights(engine, best)
        logits = engine.logits(tokens_alone(torch.tensor(given["tokens"])))
        save_file({"logits": logits.contiguous()}, given["file"])
        ranks.answer(job, rank, "done")


def huggingface_round_trip(job: Job, rank: int, rendezvous: str) -> None:
    """A Hugging Face folder into a layout: logits, some training steps, and out again."""
    given = ranks.settings(job)
    layout = Layout(**given["layout"])
    with ranks.joined(job, rank, rendezvous, layout) as world:
        import numpy as np
        import torch
        from megatron.core import parallel_state
        from safetensors.torch import save_file

        from llmscale.data.samples import rank_places
        from llmscale.models.huggingface import HuggingFaceWeights, export, fill
        from llmscale.models.huggingface_config import read_architecture, read_vocabulary
        from llmscale.training.batches import tokens_alone
        from llmscale.training.megatron_engine import MegatronEngine
        from llmscale.training.objectives import Causal
        from llmscale.training.settings import Optimizer

        source = Path(given["source"])
        architecture = read_architecture(source)
        vocabulary = read_vocabulary(source)
        optimizer = Optimizer(learning_rate=1e-4, schedule="constant")
        engine = MegatronEngine(architecture, vocabulary, layout, optimizer)
        fill(engine.chunks, architecture, vocabulary, HuggingFaceWeights(source))
        tokens = torch.tensor(given["tokens"])
        logits = engine.logits(tokens_alone(tokens))
        if logits is not None and given.get("file"):
            last = parallel_state.get_data_parallel_rank() == 0
            if last and parallel_state.get_tensor_model_parallel_rank() == 0:
                save_file({"logits": logits.contiguous()}, given["file"])
        before = Path(given["exported"])
        _export(engine, before, world.first, export)
        losses = []
        for step in range(given.get("steps", 0)):
            places = rank_places(
                consumed=2 * step,
                global_batch=2,
                micro_batch=1,
                data_rank=parallel_state.get_data_parallel_rank(),
                data_ranks=parallel_state.get_data_parallel_world_size(),
            )
            windows = [np.array([given["tokens"][0]] * len(p)) for p in places]
            batches = [Causal().batch(window, [], world.device) for window in windows]
            losses.append(engine.train_step(batches, 1e-4).loss)
        if losses:
            _export(engine, Path(given["trained"]), world.first, export)
        ranks.answer(job, rank, losses)


def packed_logits(job: Job, rank: int, rendezvous: str) -> None:
    """Logits of a sample of several documents that are kept apart."""
    given = ranks.settings(job)
    layout = Layout(**given["layout"])
    with ranks.joined(job, rank, rendezvous, layout) as world:
        import numpy as np
        from safetensors.torch import save_file

        from llmscale.models.huggingface import HuggingFaceWeights, fill
        from llmscale.models.huggingface_config import read_architecture, read_vocabulary
        from llmscale.training.megatron_engine import MegatronEngine
        from llmscale.training.objectives import Causal
        from llmscale.training.settings import Optimizer

        source = Path(given["source"])
        architecture, vocabulary = read_architecture(source), read_vocabulary(source)
        engine = MegatronEngine(architecture, vocabulary, layout, Optimizer(learning_rate=1.0))
        fill(engine.chunks, architecture, vocabulary, HuggingFaceWeights(source))
        window = np.array([given["window"]])
        batch = Causal(given["document_end"]).batch(window, [0], world.device)
        logits = engine.logits(batch)
        if rank == 0 and logits is not None:
            tensors = {"logits": logits.contiguous(), "counted": batch.mask_bs.contiguous()}
            save_file(tensors, given["file"])
        ranks.answer(job, rank, "done")


def _export(engine: Any, folder: Path, first: bool, export: Any) -> None:
    import torch.distributed as dist

    if first:
        folder.mkdir()
    dist.barrier()
    export(engine.chunks, engine.architecture, engine.vocabulary, folder)


def nonfinite_step(job: Job, rank: int, rendezvous: str) -> None:
    """A step with a loss that is no number, between two that are."""
    with ranks.joined(job, rank, rendezvous, Layout(data=job.task.ranks)) as world:
        from dataclasses import replace

        import numpy as np
        import torch

        from llmscale.models.architecture import Architecture
        from llmscale.models.huggingface import fill
        from llmscale.training.megatron_engine import MegatronEngine
        from llmscale.training.objectives import Causal
        from llmscale.training.settings import Optimizer

        architecture = Architecture(
            layers=1, hidden_size=16, attention_heads=2, ffn_size=32, sequence_length=8
        )
        engine = MegatronEngine(architecture, 50, Layout(), Optimizer(learning_rate=1e-2))
        fill(engine.chunks, architecture, 50, 1)
        windows = np.random.default_rng(rank).integers(0, 50, (2, 9))
        good = Causal().batch(windows, [], world.device)
        bad = replace(good, mask_bs=good.mask_bs * float("nan")) if rank == 0 else good

        def weights() -> torch.Tensor:
            return torch.cat([p.detach().flatten().clone() for p in engine.chunks[0].parameters()])

        first = engine.train_step([good], 1e-2)
        before = weights()
        skipped = engine.train_step([bad], 1e-2)
        unchanged = bool(torch.equal(before, weights()))
        third = engine.train_step([good], 1e-2)
        changed = not torch.equal(before, weights())
        ranks.answer(
            job,
            rank,
            {
                "applied": [first.applied, skipped.applied, third.applied],
                "unchanged": unchanged,
                "changed": changed,
            },
        )


def fail_alone(job: Job, rank: int, rendezvous: str) -> None:
    """One rank fails by itself while the others wait for it in a collective."""
    with ranks.joined(job, rank, rendezvous, Layout(data=job.task.ranks)):
        import time

        import torch
        import torch.distributed as dist

        if rank == ranks.settings(job)["failing"]:
            time.sleep(0.5)
            raise ValueError("the disk of this rank is on fire")
        dist.all_reduce(torch.ones(1))
