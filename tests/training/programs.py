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
        engine.load_weights(checkpoints.path(best))
        logits = engine.logits(tokens_alone(torch.tensor(given["tokens"])))
        save_file({"logits": logits.contiguous()}, given["file"])
        ranks.answer(job, rank, "done")


def huggingface_round_trip(job: Job, rank: int, rendezvous: str) -> None:
    """A Hugging Face folder into a layout: logits, and on request some steps, and out again."""
    given = ranks.settings(job)
    layout = Layout(**given["layout"])
    with ranks.joined(job, rank, rendezvous, layout) as world:
        ranks.answer(job, rank, _round_trip(given, layout, world))


def huggingface_round_trips(job: Job, rank: int, rendezvous: str) -> None:
    """The same with several folders, one after the other at one layout."""
    given = ranks.settings(job)
    layout = Layout(**given["layout"])
    with ranks.joined(job, rank, rendezvous, layout) as world:
        for case in given["cases"]:
            _round_trip(case, layout, world)
        ranks.answer(job, rank, "done")


def _round_trip(given: dict[str, Any], layout: Layout, world: Any) -> list[float]:
    """The losses of the steps."""
    import numpy as np
    from megatron.core import parallel_state
    from safetensors.torch import save_file

    from llmscale.models.huggingface import export, fill
    from llmscale.models.huggingface_config import read_architecture, read_vocabulary
    from llmscale.models.stored_weights import HuggingFaceWeights
    from llmscale.training.megatron_engine import MegatronEngine
    from llmscale.training.objectives import Causal
    from llmscale.training.settings import Optimizer

    source = Path(given["source"])
    architecture, vocabulary = read_architecture(source), read_vocabulary(source)
    optimizer = Optimizer(learning_rate=1e-4, schedule="constant")
    engine = MegatronEngine(architecture, vocabulary, layout, optimizer)
    fill(engine.chunks, architecture, vocabulary, HuggingFaceWeights(source))
    logits = engine.logits(_looked_at(given, world.device))
    first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    if logits is not None and first and parallel_state.get_tensor_model_parallel_rank() == 0:
        save_file({"logits": logits.contiguous()}, given["file"])
    if "exported" in given:
        _export(engine, Path(given["exported"]), world.first, export)
    losses = []
    for step in range(given.get("steps", 0)):
        windows = [np.array([given["tokens"][0]] * len(p)) for p in _places(step, 2, 1)]
        batches = [Causal().batch(window, [], world.device) for window in windows]
        losses.append(engine.train_step(batches, 1e-4).loss)
    if losses:
        _export(engine, Path(given["trained"]), world.first, export)
    return losses


def _looked_at(given: dict[str, Any], device: Any) -> Any:
    """Tokens, an encoder's and a decoder's tokens, or a window of several documents."""
    import numpy as np
    import torch

    from llmscale.training.batches import spans_alone, tokens_alone
    from llmscale.training.objectives import Causal

    if "window" in given:
        window = np.array([given["window"]])
        return Causal(given["document_end"]).batch(window, [0], device)
    if "targets" in given:
        return spans_alone(torch.tensor(given["inputs"]), torch.tensor(given["targets"]))
    return tokens_alone(torch.tensor(given["tokens"]))


def _places(step: int, samples: int, micro_batch: int) -> list[list[int]]:
    """This data rank's micro-batches of a step."""
    from megatron.core import parallel_state

    from llmscale.data.samples import rank_places

    return rank_places(
        consumed=samples * step,
        global_batch=samples,
        micro_batch=micro_batch,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_ranks=parallel_state.get_data_parallel_world_size(),
    )


def t5_steps(job: Job, rank: int, rendezvous: str) -> None:
    """Some steps of T5 from the seed, or from another layout's checkpoint, and the model."""
    given: Any = ranks.settings(job)
    layout = Layout(**given["layout"])
    with ranks.joined(job, rank, rendezvous, layout) as world:
        import numpy as np

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
        engine = MegatronEngine(architecture, 301, layout, optimizer)
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
            batches = [objective.batch(text[own], own, world.device) for own in _places(step, 8, 2)]
            result = engine.train_step(batches, 1e-3)
            results.append([result.loss, result.gradient_norm])
            if step + 1 == given.get("save"):
                checkpoints.save(engine, TrainingState(step=step + 1))
        _export(engine, Path(given["exported"]), world.first, export)
        ranks.answer(job, rank, results)


def step_of_one_token(job: Job, rank: int, rendezvous: str) -> None:
    """A step in which the first token of all counts alone, so that one context rank has it."""
    layout = Layout(**ranks.settings(job)["layout"])
    with ranks.joined(job, rank, rendezvous, layout) as world:
        from dataclasses import replace

        import numpy as np

        from llmscale.models.architecture import Architecture
        from llmscale.models.huggingface import fill
        from llmscale.training.megatron_engine import MegatronEngine
        from llmscale.training.objectives import Causal
        from llmscale.training.settings import Optimizer

        architecture = Architecture(
            layers=2, hidden_size=16, attention_heads=2, ffn_size=32, sequence_length=16
        )
        engine = MegatronEngine(architecture, 50, layout, Optimizer(learning_rate=1e-3))
        fill(engine.chunks, architecture, 50, 1)
        windows = np.random.default_rng(1).integers(0, 50, (2, 17))
        batch = Causal().batch(windows, [], world.device)
        mask = batch.mask_bs * 0
        mask[0, 0] = 1
        result = engine.train_step([replace(batch, mask_bs=mask)], 1e-3)
        answer = {"loss": result.loss, "norm": result.gradient_norm, "tokens": result.count}
        ranks.answer(job, rank, answer)


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


def adapter_gradients(job: Job, rank: int, rendezvous: str) -> None:
    """Models with adapters from files: logits, loss, and every gradient of the adapter."""
    given = ranks.settings(job)
    layout = Layout(**given["layout"])
    with ranks.joined(job, rank, rendezvous, layout) as world:
        import numpy as np
        import torch
        from safetensors.torch import load_file, save_file

        from llmscale.models.huggingface import fill
        from llmscale.models.huggingface_config import read_architecture, read_vocabulary
        from llmscale.models.low_rank import low_rank_pairs
        from llmscale.models.stored_weights import HuggingFaceWeights
        from llmscale.training.batches import tokens_alone
        from llmscale.training.megatron_engine import MegatronEngine
        from llmscale.training.objectives import Causal
        from llmscale.training.settings import Adapter, Optimizer

        windows = np.array(given["windows"])
        losses = {}
        for name, folder in given["models"].items():
            source = Path(folder)
            architecture, vocabulary = read_architecture(source), read_vocabulary(source)
            engine = MegatronEngine(
                architecture,
                vocabulary,
                layout,
                Optimizer(learning_rate=1e-3),
                recompute=given["recompute"],
                adapter=Adapter(**given["adapter"]),
            )
            fill(engine.chunks, architecture, vocabulary, HuggingFaceWeights(source))
            drawn = load_file(source / "drawn.safetensors")
            group = torch.distributed.group.WORLD if layout.tensor > 1 else None
            place = (group.rank(), group.size()) if group is not None else (0, 1)
            parts = [part for pair in low_rank_pairs(engine.chunks) for part in pair.parts()]
            with torch.no_grad():
                for part in parts:
                    part.parameter.copy_(part.form.split([drawn[part.name]], *place))
            logits = engine.logits(tokens_alone(torch.tensor(windows[:, :-1])))
            each = [Causal().batch(windows[[row]], [], world.device) for row in range(len(windows))]
            totals = engine.backward(each)
            found = {}
            for part in parts:
                part.parameter.data = part.parameter.main_grad
                found[part.name] = part.whole().contiguous()
            if logits is not None and world.first:
                found["logits"] = logits.contiguous()
            if layout.pipeline > 1 or world.first:
                save_file(found, source / f"found-{rank}.safetensors")
            losses[name] = totals.mean
        ranks.answer(job, rank, losses)
