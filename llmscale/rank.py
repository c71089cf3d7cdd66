"""What every rank runs, whoever started it: the recipe's stage, from the run folder alone."""

from pathlib import Path

from llmscale.artifacts import RunFolder
from llmscale.clusters.base import Job
from llmscale.progress import Progress
from llmscale.recipe.recipe import Recipe, read_resolved
from llmscale.stages.base import Stage, Workspace


def run_rank(job: Job, rank: int, rendezvous: str) -> None:
    """Runs one rank of one task of a stage."""
    import llmscale.quiet  # noqa: F401

    run_folder = RunFolder(job.run_folder)
    recipe = read_resolved(run_folder.recipe_file)
    stage = recipe.stages[job.stage]
    folder = run_folder.stage(job.stage)
    workspace = Workspace(
        folder=folder,
        inputs=input_folders(recipe, stage, run_folder),
        seed=recipe.seed,
        device=_device(recipe, job),
        progress=Progress(folder.progress_file),
        rank=rank,
        ranks=job.task.ranks,
        rendezvous=rendezvous,
    )
    stage.run(job.task.name, workspace)


def _device(recipe: Recipe, job: Job) -> str:
    if not job.task.on_device:
        return "cpu"
    from llmscale.parallel.world import resolve_device

    return resolve_device(recipe.cluster.device)


def input_folders(recipe: Recipe, stage: Stage, run_folder: RunFolder) -> dict[str, Path]:
    """Where each link of a stage leads: another stage's product, or a folder."""
    linked = stage.linked(recipe.stages)
    folders = {
        key: run_folder.stage(name).path / recipe.stages[name].product
        for key, name in linked.items()
    }
    for named in stage.named():
        if named.key not in folders:
            folders[named.key] = Path(named.name)
    return folders
