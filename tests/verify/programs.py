"""What ranks run in the tests of proofs: many proofs in one world, some with planted errors."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from llmscale.clusters.base import Job
from llmscale.parallel.layout import Layout
from tests import ranks


def references(job: Job, rank: int, rendezvous: str) -> None:
    """The references of all cases, one after the other."""
    _each(job, rank, rendezvous, "reference")


def layouts(job: Job, rank: int, rendezvous: str) -> None:
    """The layouts of all cases that have this many ranks."""
    _each(job, rank, rendezvous, "layout")


def resumed(job: Job, rank: int, rendezvous: str) -> None:
    """The checkpoints of all cases, each taken up at one rank."""
    _each(job, rank, rendezvous, "resumed")


def _each(job: Job, rank: int, rendezvous: str, task: str) -> None:
    import llmscale.quiet  # noqa: F401
    from llmscale.parallel.world import joined_world, process_groups
    from llmscale.verify.proof import Proof
    from llmscale.verify.runs import resume_at_one_rank, run_layout, run_reference
    from tests.verify import plants

    several_layouts = task == "layout"
    with (
        joined_world(rank=rank, ranks=job.task.ranks, rendezvous=rendezvous, device="cpu"),
        nullcontext() if several_layouts else process_groups(Layout(), seed=1),
    ):
        for case in ranks.settings(job)["cases"]:
            print(case["folder"])
            proof = Proof.model_validate(case["proof"])
            folder, reference = Path(case["folder"]), Path(case["reference"])
            if task == "reference":
                run_reference(proof, folder)
            elif task == "resumed":
                resume_at_one_rank(proof, reference, folder)
            else:
                plant = getattr(plants, case["plant"] or "nothing")
                with plant(), process_groups(proof.parallel, proof.seed):
                    run_layout(proof, reference, folder)
                _forget_groups()
    ranks.answer(job, rank, "done")


def _forget_groups() -> None:
    """An engine that is done refers to itself, and a cache of angles to its groups, whose threads
    cost time even when they idle."""
    import gc

    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    RotaryEmbedding.forward.cache_clear()
    gc.collect()


def experts_and_a_dense_loop(job: Job, rank: int, rendezvous: str) -> None:
    """A layer of experts on two ranks: outputs and gradients, gathered in files."""
    given: dict[str, Any] = ranks.settings(job)
    layout = Layout(**given["layout"])
    with ranks.joined(job, rank, rendezvous, layout):
        import torch
        from megatron.core import parallel_state
        from safetensors.torch import load_file, save_file

        from llmscale.models.architecture import Architecture
        from llmscale.models.huggingface import describe, fill
        from llmscale.models.megatron import build_chunks, inner_model

        architecture = Architecture(**given["model"])
        chunks = build_chunks(architecture, 100, layout)
        fill(chunks, architecture, 100, given["seed"])
        for parameter in chunks[0].parameters():
            parameter.grad_added_to_main_grad = False
            parameter.main_grad = torch.zeros_like(parameter)
        layer = inner_model(chunks[0]).decoder.layers[0].mlp
        tokens = load_file(given["inputs"])["inputs"]
        own = tokens[:, rank :: job.task.ranks].clone().requires_grad_()
        output, _ = layer(own)
        (output * torch.arange(output.numel()).view_as(output).cos()).sum().backward()
        weights = {}
        for name, parameter, description in describe(chunks[0], architecture, 100):
            if ".mlp.experts." in name:
                gradient = parameter.main_grad
                weights.update(
                    zip(description.names, description.form.join([gradient]), strict=True)
                )
            elif ".mlp.router." in name:
                weights[f"rank{rank}"] = parameter.grad
        save_file(
            {
                "output": output.detach().contiguous(),
                "inputs": own.grad.contiguous(),
                **{n: t.contiguous().clone() for n, t in weights.items()},
            },
            f"{given['outputs']}-{parallel_state.get_data_parallel_rank()}.safetensors",
        )
        ranks.answer(job, rank, "done")
