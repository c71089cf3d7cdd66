"""One training rank, from its settings to an exported model: the build order, a line a step."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from llmscale.artifacts import StageFolder, publish_folder, read_json, write_json
from llmscale.data.tokenizer import load_tokenizer
from llmscale.errors import RecipeError
from llmscale.mirror import Mirror
from llmscale.parallel.layout import Layout
from llmscale.parallel.world import World, joined_world, process_groups
from llmscale.stages.base import Workspace
from llmscale.stages.engines import FirstWeights, TrainedModel, built_engine
from llmscale.stages.trained import TrainedStage
from llmscale.training.checkpoint import STATE, Checkpoints, TrainingState, first_of_folder
from llmscale.training.data import TrainingData, ValidationSamples
from llmscale.training.engine import Engine
from llmscale.training.log import TrainingLog
from llmscale.training.loop import Completing, Trainer
from llmscale.training.peak import peak_flops
from llmscale.training.signals import listening

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    CHAT_TEMPLATE,
)


class Measures(Protocol):
    """What is measured of a model beside training it; every method is collective."""

    def before(self, engine: Engine) -> None:
        """Measures the first weights."""

    def after(self, engine: Engine) -> None:
        """Measures the best weights."""


@dataclass(frozen=True)
class Course:
    """What a stage trains: a model from its first weights on, with some data, for some steps.

    Attributes:
        start_from: a Hugging Face folder or an import with the first weights; None for weights
            from the seed.
        patience: after how many validations without a better loss training ends.
        baseline: whether the first weights are validated, too.
        completing: makes of a reference what adds to each global batch what its loss needs.
        alongside: whether the first model is kept in memory as that reference.
        measures: what is measured of the model besides its loss.
    """

    model: TrainedModel
    start_from: Path | None
    data: TrainingData
    validation: ValidationSamples | None
    steps: int
    patience: int | None = None
    baseline: bool = False
    completing: Callable[[Engine | None], Completing] | None = None
    alongside: bool = False
    measures: Measures | None = None


@contextmanager
def joined_ranks(stage: TrainedStage, workspace: Workspace) -> Iterator[World]:
    """All ranks of a task, met and grouped by the stage's layouts."""
    layouts = stage.layouts(workspace.ranks)
    sizes = [layout.model_ranks * layout.data_ranks(workspace.ranks) for layout in layouts]
    with (
        joined_world(
            rank=workspace.rank,
            ranks=workspace.ranks,
            rendezvous=workspace.rendezvous,
            device=workspace.device,
            timeout_seconds=stage.health.timeout_seconds,
            sizes=sizes if len(sizes) > 1 else None,
        ) as world,
        process_groups(layouts[world.group], workspace.seed),
    ):
        yield world


def train(stage: TrainedStage, workspace: Workspace, course: Course) -> None:
    """Trains and exports the best checkpoint; every rank of the task calls it."""
    with listening() as stop, joined_ranks(stage, workspace) as world:
        say = print if world.first else _silent
        checkpoints = Checkpoints(workspace.folder.checkpoints, stage.checkpoint.keep, say)
        newest = checkpoints.newest_whole()
        first_weights = FirstWeights(course.start_from, workspace.seed, left_out=newest is not None)
        with (
            built_engine(
                stage, course.model, first_weights, stage.parallel, workspace.device
            ) as engine,
            _reference(stage, course, workspace) as reference,
        ):
            state = TrainingState() if newest is None else checkpoints.load(engine, newest)
            log = training_log(stage, course.steps, workspace, world, state)
            trainer = Trainer(
                engine=engine,
                data=course.data,
                validation=course.validation,
                steps=course.steps,
                patience=course.patience,
                baseline=course.baseline,
                micro_batch=stage.batch.micro,
                checkpointing=stage.checkpoint,
                health=stage.health,
                checkpoints=checkpoints,
                stop=stop,
                log=log,
                completing=course.completing(reference) if course.completing else None,
                say=say,
            )
            if course.measures is not None and state.step == 0:
                course.measures.before(engine)
            try:
                state = trainer.train(state)
            finally:
                if log is not None:
                    log.close()
            _export_best(course, workspace, engine, checkpoints, state)


@contextmanager
def _reference(
    stage: TrainedStage, course: Course, workspace: Workspace
) -> Iterator[Engine | None]:
    """The model as it was at first, never trained, if the course needs it alongside."""
    if not course.alongside:
        yield None
        return
    model = replace(course.model, adapter=None)
    first = FirstWeights(course.start_from, workspace.seed)
    with built_engine(
        stage, model, first, stage.parallel, workspace.device, frozen=True
    ) as reference:
        yield reference


def _silent(_line: str) -> None:
    pass


def training_log(
    stage: TrainedStage, steps: int, workspace: Workspace, world: World, state: TrainingState
) -> TrainingLog | None:
    """The log of rank 0; the peak is measured while the other ranks wait; collective."""
    log = None
    if world.first:
        peak = peak_flops(world.device, stage.precision)
        if peak is not None and world.device.type == "cuda":
            peak *= world.ranks
        log = TrainingLog(
            workspace.folder,
            workspace.progress,
            steps=steps,
            resumed_step=state.step,
            peak_flops=peak,
        )
    dist.barrier()
    return log


def _export_best(
    course: Course,
    workspace: Workspace,
    engine: Engine,
    checkpoints: Checkpoints,
    state: TrainingState,
) -> None:
    """Writes ``hf/`` from the checkpoint of least validation loss, else the last; collective."""
    best = state.best_step or state.step
    if best != state.step and not checkpoints.whole(best):
        best = state.step
    if best != state.step:
        engine.load_weights(checkpoints.path(best))
    if course.measures is not None:
        course.measures.after(engine)
    export_trained(course.model, workspace, engine, replace(state, best_step=best))


def export_trained(
    model: TrainedModel, workspace: Workspace, engine: Engine, state: TrainingState
) -> None:
    """Writes ``hf/`` from the weights as they are, and what training came to; collective."""
    if dist.get_rank() == 0 and (mirror := Mirror.of(workspace.folder.path.parent)) is not None:
        mirror.clear(f"{workspace.folder.path.name}/{workspace.folder.hf.name}")
    first_here = first_of_folder(workspace.folder.path)
    export_folder(engine, model, workspace.folder.hf, first_here)
    if dist.get_rank() == 0:
        workspace.folder.add_metrics(
            steps=state.step,
            tokens_seen=state.tokens,
            best_step=state.best_step or state.step,
            validation_loss=state.best_loss,
            parameters=engine.parameters(),
        )


def export_folder(engine: Engine, model: TrainedModel, target: Path, first_here: bool) -> None:
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
            if (model.tokenizer / name).is_file():
                shutil.copy(model.tokenizer / name, beside / name)
        for name, file in model.beside.items():
            if file.is_file():
                shutil.copy(file, beside / name)
        if model.chat_template is not None:
            (beside / CHAT_TEMPLATE).write_text(model.chat_template, encoding="utf-8")
    dist.barrier()
    engine.export(beside)
    if dist.get_rank() == 0 and model.architecture.decoders:
        _name_special_tokens(beside)
    if dist.get_rank() == 0 and model.architecture.scored:
        _add_to_config(beside, {"pad_token_id": model.padding})
    dist.barrier()
    if first_here:
        publish_folder(beside, target)
    dist.barrier()


def _name_special_tokens(folder: Path) -> None:
    """Tells transformers' T5 which tokens end a text, pad it, and start its decoder."""
    tokenizer = load_tokenizer(folder)
    padding, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    special = {"pad_token_id": padding, "eos_token_id": end, "decoder_start_token_id": padding}
    _add_to_config(folder, special)


def _add_to_config(folder: Path, added: dict[str, Any]) -> None:
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **added})


def export_at_one_rank(
    stage: TrainedStage,
    model: TrainedModel,
    start_from: Path | None,
    *,
    folder: StageFolder,
    target: Path,
    rendezvous: str,
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
        checkpoints = Checkpoints(folder.checkpoints, stage.checkpoint.keep)
        newest = checkpoints.newest_whole()
        if newest is None:
            raise RecipeError(f"{folder.path}: no whole checkpoint yet; run the stage first")
        best = read_json(checkpoints.path(newest) / STATE)["best_step"] or newest
        if best != newest and not checkpoints.whole(best):
            best = newest
        first_weights = FirstWeights(start_from, seed=0, left_out=True)
        with built_engine(stage, model, first_weights, Layout(), "cpu") as engine:
            engine.load_weights(checkpoints.path(best) / stage.checkpointed)
            export_folder(engine, model, target, first_here=True)
        return best
