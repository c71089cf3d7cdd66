"""Corpora as tokens on disk: made once, before training starts."""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from llmscale.artifacts import StageFolder, new_folder, read_json, write_json
from llmscale.data.corpus import SPLITS, Split, read_split
from llmscale.data.samples import Samples
from llmscale.data.tokenizer import load_tokenizer, sentinel
from llmscale.data.tokens import TokenStream, batches, encoded, write_tokens
from llmscale.errors import RecipeError
from llmscale.models.huggingface_config import read_vocabulary
from llmscale.parallel.layout import Layout
from llmscale.parallel.turns import in_turns
from llmscale.parallel.world import joined_world, process_groups
from llmscale.stages.base import Workspace
from llmscale.stages.engines import FirstWeights, TrainedModel, set_first_weights
from llmscale.stages.pretrain import ABOUT_TOKENS, FIRST_WEIGHTS, Pretrain
from llmscale.stages.train_rank import Course
from llmscale.training.curriculum import PlacedPhase
from llmscale.training.data import PhaseSamples, TrainingData, ValidationData
from llmscale.training.megatron_engine import MegatronEngine
from llmscale.training.objectives import Objective, make_objective

SECONDS_FOR_A_TURN = 3600.0


def make_tokens(stage: Pretrain, workspace: Workspace) -> None:
    """Writes ``tokens/CORPUS/train`` and ``.../validation`` (.bin, .idx) and what they are.

    Every rank of the task calls it; they encode in turns, and the first one writes.

    Raises:
        RecipeError: if a training split is too short for one sample, or the tokenizer
            lacks a token that the model's objective needs.
    """
    tokenizer = load_tokenizer(workspace.inputs["tokenizer"])
    _require_tokens(stage, workspace.inputs["tokenizer"], tokenizer)
    with _together(workspace):
        documents = {
            (name, split): _encoded_in_turns(workspace, key, split, tokenizer)
            for name, key in stage.corpora().items()
            for split in SPLITS
        }
        if workspace.rank == 0:
            _write(stage, workspace, tokenizer, documents)
        else:
            for share in documents.values():
                deque(share, maxlen=0)


def _together(workspace: Workspace) -> AbstractContextManager[object]:
    if workspace.ranks == 1:
        return nullcontext()
    return joined_world(
        rank=workspace.rank,
        ranks=workspace.ranks,
        rendezvous=workspace.rendezvous,
        device="cpu",
        timeout_seconds=SECONDS_FOR_A_TURN,
    )


def _encoded_in_turns(
    workspace: Workspace, key: str, split: str, tokenizer: Any
) -> Iterator[np.ndarray]:
    texts = read_split(workspace.inputs[key], split)
    turns = in_turns(
        partial(encoded, tokenizer=tokenizer), batches(texts), workspace.rank, workspace.ranks
    )
    return chain.from_iterable(turns)


def _write(
    stage: Pretrain,
    workspace: Workspace,
    tokenizer: Any,
    documents: Mapping[tuple[str, Split], Iterator[np.ndarray]],
) -> None:
    folder = workspace.folder.path / "tokens"
    total = sum(
        sum(1 for _ in read_split(workspace.inputs[stage.corpora()[name]], split))
        for name, split in documents
    )
    done = count(1)

    def told(share: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for tokens in share:
            workspace.progress.update(next(done), total, "documents", "tokens")
            yield tokens

    with new_folder(folder) as beside:
        counts: dict[str, dict[str, int]] = {name: {} for name in stage.corpora()}
        for (name, split), share in documents.items():
            (beside / name).mkdir(exist_ok=True)
            counts[name][split] = write_tokens(told(share), len(tokenizer), beside / name / split)
        about = {
            "vocabulary": _vocabulary(stage, len(tokenizer)),
            "tokenizer_size": len(tokenizer),
            "end_of_text": tokenizer.eos_token_id,
            "mask_token": tokenizer.mask_token_id,
            "special_tokens": tokenizer.all_special_ids,
            "padding": tokenizer.pad_token_id,
            "sentinels": _sentinels(tokenizer.get_vocab()),
            "corpora": counts,
        }
        _require_a_sample(stage, about)
        write_json(beside / Path(ABOUT_TOKENS).name, about)
    workspace.folder.add_metrics(tokens=counts)


def _require_tokens(stage: Pretrain, folder: Path, tokenizer: Any) -> None:
    """Checks that the tokenizer has what the model's objective needs."""
    family, kind = stage.architecture().family, stage.architecture().traits.objective
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            f"{folder}: the tokenizer has no end-of-text token (eos_token); name one in its "
            "tokenizer_config.json, or use another tokenizer"
        )
    if kind == "masked" and tokenizer.mask_token_id is None:
        raise RecipeError(
            f"{folder}: the tokenizer has no mask token, which {family} needs; "
            "give a folder whose tokenizer has one"
        )
    if kind != "spans":
        return
    sentinels, needed = len(_sentinels(tokenizer.get_vocab())), stage.sentinels()
    if tokenizer.pad_token_id is None or sentinels < needed:
        has = f"{sentinels} sentinels" if sentinels < needed else "no padding token"
        raise RecipeError(
            f"{folder}: the tokenizer has {has}, but {family} needs {needed} sentinels "
            f"({sentinel(0)}, ...) and padding; use another tokenizer"
        )


def _require_a_sample(stage: Pretrain, about: Mapping[str, Any]) -> None:
    for phase in stage.phases():
        needed = _objective(stage, about, phase.sequence_length, 0).sample_length(
            phase.sequence_length
        )
        for name in phase.weights:
            tokens = about["corpora"][name]["train"]
            if tokens <= needed:
                raise RecipeError(
                    f"the training split of {name} has {tokens} tokens, too few for "
                    f"one sample of {needed} + 1; add text or lower sequence_length"
                )


def _vocabulary(stage: Pretrain, tokenizer_size: int) -> int:
    """The model's vocabulary: the tokenizer's, or that of the model the stage starts from."""
    if stage.start_from is None:
        return tokenizer_size
    size = read_vocabulary(Path(stage.start_from))
    if tokenizer_size > size:
        raise RecipeError(
            f"the tokenizer has {tokenizer_size} tokens, more than the {size} of "
            f"{stage.start_from}; use that folder as tokenizer"
        )
    return size


def pretrained(stage: Pretrain, folder: StageFolder, tokenizer: Path) -> TrainedModel:
    """The model that a stage of pretraining trains, once its tokens are made."""
    about = read_json(folder.path / ABOUT_TOKENS) or {"vocabulary": 0}
    return TrainedModel(stage.architecture(), about["vocabulary"], tokenizer)


def first_folder(stage: Pretrain, folder: StageFolder) -> Path | None:
    """Where the model's first weights are; None where they come from the seed on each rank."""
    if stage.start_from:
        return Path(stage.start_from)
    return folder.path / FIRST_WEIGHTS if stage.engine == "deepspeed" else None


def write_first_weights(stage: Pretrain, workspace: Workspace) -> None:
    """Writes the weights from the seed as a Hugging Face folder, for the DeepSpeed engine."""
    model = pretrained(stage, workspace.folder, workspace.inputs["tokenizer"])
    with (
        joined_world(rank=0, ranks=1, rendezvous=workspace.rendezvous, device="cpu"),
        process_groups(Layout(), workspace.seed),
        new_folder(workspace.folder.path / FIRST_WEIGHTS) as beside,
    ):
        engine = MegatronEngine(model.architecture, model.vocabulary, Layout(), stage.optimizer)
        set_first_weights(engine, FirstWeights(None, workspace.seed))
        engine.export(beside)


def pretraining(stage: Pretrain, workspace: Workspace) -> Course:
    """What a stage of pretraining trains."""
    return Course(
        model=pretrained(stage, workspace.folder, workspace.inputs["tokenizer"]),
        start_from=first_folder(stage, workspace.folder),
        data=training_data(stage, workspace),
        validation=validation_data(stage, workspace),
        steps=stage.steps,
    )


def training_data(stage: Pretrain, workspace: Workspace) -> TrainingData:
    """What every step trains on."""
    folder = workspace.folder.path / "tokens"
    about = read_json(workspace.folder.path / ABOUT_TOKENS)
    streams = {name: TokenStream(folder / name / "train") for name in stage.corpora()}

    def samples(phase: PlacedPhase) -> PhaseSamples:
        objective = _objective(stage, about, phase.sequence_length, workspace.seed)
        length = objective.sample_length(phase.sequence_length)
        sources = {name: Samples(streams[name], length, workspace.seed) for name in phase.weights}
        return PhaseSamples(phase, sources, objective)

    return TrainingData(stage.batch, [samples(phase) for phase in stage.phases()])


def validation_data(stage: Pretrain, workspace: Workspace) -> ValidationData | None:
    """Validation samples of every corpus, of the stage's own length in every phase.

    Returns:
        None if no corpus has enough text for one.
    """
    folder = workspace.folder.path / "tokens"
    about = read_json(workspace.folder.path / ABOUT_TOKENS)
    objective = _objective(stage, about, stage.window, workspace.seed)
    length = objective.sample_length(stage.window)
    sources = [
        Samples(TokenStream(folder / name / "validation"), length, workspace.seed)
        for name in stage.corpora()
        if about["corpora"][name]["validation"] > length
    ]
    return ValidationData(sources, stage.validation.samples, objective) if sources else None


def _objective(stage: Pretrain, about: Mapping[str, Any], length: int, seed: int) -> Objective:
    return make_objective(
        stage.architecture().traits.objective,
        about,
        sequence_length=length,
        seed=seed,
        separate_documents=stage.separate_documents,
    )


def _sentinels(vocabulary: Mapping[str, int]) -> list[int]:
    """The tokens for spans taken out of texts, as many as there are without a gap."""
    names = takewhile(vocabulary.__contains__, map(sentinel, count()))
    return [vocabulary[name] for name in names]
