"""What every rank of a proof runs."""

from pathlib import Path

from llmscale.artifacts import read_json
from llmscale.clusters.base import Job
from llmscale.verify.proof import Proof

PROOF = "proof.json"
REFERENCE, LAYOUT, RESUMED = "reference", "layout", "resumed"


def prove_rank(job: Job, rank: int, rendezvous: str) -> None:
    """One rank of one task of the proof in the job's folder."""
    import llmscale.quiet  # noqa: F401
    from llmscale.parallel.layout import Layout
    from llmscale.parallel.world import joined_world, process_groups

    folder: Path = job.run_folder / job.stage
    proof = Proof.model_validate(read_json(folder / PROOF))
    if proof.learning is None:
        from llmscale.verify import runs as tasks
    else:
        from llmscale.verify import learning as tasks  # type: ignore[no-redef]
    layout = proof.parallel if job.task.name == LAYOUT else Layout()
    with (
        joined_world(rank=rank, ranks=job.task.ranks, rendezvous=rendezvous, device="cpu"),
        process_groups(layout, proof.seed),
    ):
        if job.task.name == REFERENCE:
            tasks.run_reference(proof, folder / REFERENCE)
        elif job.task.name == LAYOUT:
            tasks.run_layout(proof, folder / REFERENCE, folder)
        else:
            tasks.resume_at_one_rank(proof, folder / REFERENCE, folder)
