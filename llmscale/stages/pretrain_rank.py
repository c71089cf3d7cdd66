"""One pretraining rank, from its settings to an exported model: the build order, a line a step."""

import shutil
from pathlib import Path

import torch.distributed as dist

from llmscale.artifacts import StageFolder, publish_folder, read_json, write_json
from llmscale.data.tokenizer import load_tokenizer
from llmscale.errors import RecipeError
from llmscale.mirror import Mirror
from llmscale.models.huggingface import HuggingFaceWeights, export, fill
from llmscale.parallel.layout import Layout
from llmscale.parallel.probes import require_precision
from llmscale.parallel.world import World, joined_world, process_groups
from llmscale.stages.base import Workspace
from llmscale.stages.imported import is_import, load_imported
from llmscale.stages.pretrain import ABOUT_TOKENS, Pretrain
from llmscale.stages.tokens import training_data, validation_data
from llmscale.training.checkpoint import STATE, Checkpoints, TrainingState, first_of_folder
from llmscale.training.log import TrainingLog
from llmscale.training.loop import Trainer
from llmscale.training.megatron_engine import MegatronEngine
from llmscale.training.peak import peak_flops
from llmscale.training.signals import listening

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def pretrain(stage: Pretrain, workspace: Workspace) -> None:
    """Trains and exports the best checkpoint; every rank of the task calls it."""
    with (
        listening() as stop,
        joined_world(
            rank=workspace.rank,
            ranks=workspace.ranks,
            rendezvous=workspace.rendezvous,
            device=workspace.device,
            timeout_seconds=stage.health.timeout_seconds,
        ) as world,
        process_groups(stage.parallel, workspace.seed),
    ):
        require_precision(stage.precision, workspace.device)
        vocabulary = read_json(workspace.folder.path / ABOUT_TOKENS)["vocabulary"]
        engine = MegatronEngine(
            stage.architecture(),
            vocabulary,
            stage.parallel,
            stage.optimizer,
            precision=stage.precision,
            recompute=stage.recompute,
            device=workspace.device,
        )
        say = print if world.first else _silent
        checkpoints = Checkpoints(workspace.folder.checkpoints, stage.checkpoint.keep, say)
        state = _restored_or_initial(stage, workspace, engine, checkpoints)
        log = _log(stage, workspace, world, state)
        trainer = Trainer(
            engine=engine,
            data=training_data(stage, workspace),
            validation=validation_data(stage, workspace),
            steps=stage.steps,
            micro_batch=stage.batch.micro,
            checkpointing=stage.checkpoint,
            health=stage.health,
            checkpoints=checkpoints,
            stop=stop,
            log=log,
            say=say,
        )
        try:
            state = trainer.train(state)
        finally:
            if log is not None:
                log.close()
        export_best(stage, workspace, engine, checkpoints, state)


def _silent(_line: str) -> None:
    pass


def _restored_or_initial(
    stage: Pretrain, workspace: Workspace, engine: MegatronEngine, checkpoints: Checkpoints
) -> TrainingState:
    newest = checkpoints.newest_whole()
    if newest is not None:
        return checkpoints.load(engine, newest)
    set_initial_weights(stage, workspace.seed, engine)
    return TrainingState()


def set_initial_weights(stage: Pretrain, seed: int, engine: MegatronEngine) -> None:
    """Weights from the folder the stage starts from, else from the seed."""
    folder = Path(stage.start_from) if stage.start_from else None
    if folder is not None and is_import(folder):
        load_imported(engine, folder)
    else:
        source = seed if folder is None else HuggingFaceWeights(folder)
        fill(engine.chunks, engine.architecture, engine.vocabulary, source)


def _log(
    stage: Pretrain, workspace: Workspace, world: World, state: TrainingState
) -> TrainingLog | None:
    """The log of rank 0; the peak is measured while the other ranks wait."""
    log = None
    if world.first:
        peak = peak_flops(world.device, stage.precision)
        if peak is not None and world.device.type == "cuda":
            peak *= world.ranks
        log = TrainingLog(
            workspace.folder,
            workspace.progress,
            steps=stage.steps,
            resumed_step=state.step,
            peak_flops=peak,
        )
    dist.barrier()
    return log


def export_best(
    stage: Pretrain,
    workspace: Workspace,
    engine: MegatronEngine,
    checkpoints: Checkpoints,
    state: TrainingState,
) -> None:
    """Writes ``hf/`` from the checkpoint of least validation loss, else the last; collective."""
    best = state.best_step or state.step
    if best != state.step and not checkpoints.whole(best):
        best = state.step
    if best != state.step:
        checkpoints.load_weights(engine, best)
    if dist.get_rank() == 0 and (mirror := Mirror.of(workspace.folder.path.parent)) is not None:
        mirror.clear(f"{workspace.folder.path.name}/{workspace.folder.hf.name}")
    first_here = first_of_folder(workspace.folder.path)
    export_folder(engine, workspace.folder.hf, workspace.inputs["tokenizer"], first_here)
    if dist.get_rank() == 0:
        workspace.folder.add_metrics(
            steps=state.step,
            tokens_seen=state.tokens,
            best_step=best,
            validation_loss=state.best_loss,
            parameters=engine.architecture.parameters(engine.vocabulary),
        )


def export_folder(engine: MegatronEngine, target: Path, tokenizer: Path, first_here: bool) -> None:
    """Writes a Hugging Face folder with its tokenizer, whole or not at all; collective.

    Args:
        first_here: whether this rank is the first of those that see the folder; where they see
            different ones, each gets what its ranks write.
    """
    beside = target.with_name(f".{target.name}.partial")
    if first_here:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    if dist.get_rank() == 0:
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copy(tokenizer / name, beside / name)
    dist.barrier()
    export(engine.chunks, engine.architecture, engine.vocabulary, beside)
    if dist.get_rank() == 0 and engine.architecture.decoders:
        _name_special_tokens(beside)
    dist.barrier()
    if first_here:
        publish_folder(beside, target)
    dist.barrier()


def _name_special_tokens(folder: Path) -> None:
    """Tells transformers' T5 which tokens end a text, pad it, and start its decoder."""
    tokenizer = load_tokenizer(folder)
    padding, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    special = {"pad_token_id": padding, "eos_token_id": end, "decoder_start_token_id": padding}
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **special})


def export_at_one_rank(
    stage: Pretrain, folder: StageFolder, tokenizer: Path, target: Path, rendezvous: str
) -> int:
    """Exports the best whole checkpoint, whatever layout it was saved at, in this process.

    Returns:
        The checkpoint's step.

    Raises:
        RecipeError: if the stage has no whole checkpoint.
    """
    with (
        joined_world(rank=0, ranks=1, rendezvous=rendezvous, device="cpu"),
        process_groups(Layout(), seed=0),
    ):
        vocabulary = (read_json(folder.path / ABOUT_TOKENS) or {}).get("vocabulary", 0)
        checkpoints = Checkpoints(folder.checkpoints, stage.checkpoint.keep)
        newest = checkpoints.newest_whole()
        if newest is None:
            raise RecipeError(f"{folder.path}: no whole checkpoint yet; run the stage first")
        best = read_json(checkpoints.path(newest) / STATE)["best_step"] or newest
        if best != newest and not checkpoints.whole(best):
            best = newest
        engine = MegatronEngine(
            stage.architecture(), vocabulary, Layout(), stage.optimizer, precision=stage.precision
        )
        checkpoints.load_weights(engine, best)
        export_folder(engine, target, tokenizer, first_here=True)
        return best
