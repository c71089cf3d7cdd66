"""Corpora as tokens on disk: made once, by one process, before any rank starts."""

from collections.abc import Mapping
from pathlib import Path

from llmscale.artifacts import new_folder, read_json, write_json
from llmscale.data.corpus import SPLITS, read_split
from llmscale.data.samples import Samples
from llmscale.data.tokenizer import load_tokenizer
from llmscale.data.tokens import TokenStream, write_tokens
from llmscale.errors import RecipeError
from llmscale.models.huggingface_config import read_vocabulary
from llmscale.stages.base import Workspace
from llmscale.stages.pretrain import Pretrain
from llmscale.training.curriculum import Span
from llmscale.training.data import PhaseSamples, TrainingData, ValidationData
from llmscale.training.objectives import Objective, make_objective

ABOUT = "tokens.json"


def make_tokens(stage: Pretrain, workspace: Workspace) -> None:
    """Writes ``tokens/CORPUS/train`` and ``.../validation`` (.bin, .idx) and what they are.

    Raises:
        RecipeError: if a training split is too short for one sample, or the tokenizer
            lacks a token that the model's objective needs.
    """
    folder = workspace.folder.path / "tokens"
    if (folder / ABOUT).exists():
        return
    tokenizer = load_tokenizer(workspace.inputs["tokenizer"])
    if stage.masked and tokenizer.mask_token_id is None:
        raise RecipeError(
            f"{workspace.inputs['tokenizer']}: the tokenizer has no mask token, which "
            f"{stage.architecture().family} needs; give a folder whose tokenizer has one"
        )
    corpora = {name: workspace.inputs[key] for name, key in stage.corpora().items()}
    documents = {
        (name, split): sum(1 for _ in read_split(corpus, split))
        for name, corpus in corpora.items()
        for split in SPLITS
    }
    total = sum(documents.values())
    before = 0
    with new_folder(folder) as beside:
        counts: dict[str, dict[str, int]] = {name: {} for name in corpora}
        for (name, split), count in documents.items():

            def on_document(number: int, before: int = before) -> None:
                workspace.progress.update(before + number, total, "documents", "tokens")

            texts = read_split(corpora[name], split)
            (beside / name).mkdir(exist_ok=True)
            counts[name][split] = write_tokens(texts, tokenizer, beside / name / split, on_document)
            before += count
        _require_a_sample(stage, counts)
        about = {
            "vocabulary": _vocabulary(stage, len(tokenizer)),
            "tokenizer_size": len(tokenizer),
            "end_of_text": tokenizer.eos_token_id,
            "mask_token": tokenizer.mask_token_id,
            "special_tokens": tokenizer.all_special_ids,
            "corpora": counts,
        }
        write_json(beside / ABOUT, about)
    workspace.folder.add_metrics(tokens=counts)


def _require_a_sample(stage: Pretrain, counts: Mapping[str, Mapping[str, int]]) -> None:
    for span in stage.spans():
        for name in span.weights:
            if counts[name]["train"] <= span.sequence_length:
                raise RecipeError(
                    f"the training split of {name} has {counts[name]['train']} tokens, too few for "
                    f"one sample of {span.sequence_length} + 1; add text or lower sequence_length"
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


def training_data(stage: Pretrain, workspace: Workspace) -> TrainingData:
    """What every step trains on."""
    folder = workspace.folder.path / "tokens"
    streams = {name: TokenStream(folder / name / "train") for name in stage.corpora()}

    def samples(span: Span) -> PhaseSamples:
        sources = {
            name: Samples(streams[name], span.sequence_length, workspace.seed)
            for name in span.weights
        }
        return PhaseSamples(span, sources)

    return TrainingData(stage.batch, [samples(span) for span in stage.spans()])


def validation_data(stage: Pretrain, workspace: Workspace) -> ValidationData | None:
    """Validation samples of every corpus, of the stage's own length in every phase.

    Returns:
        None if no corpus has enough text for one.
    """
    folder = workspace.folder.path / "tokens"
    counts = read_json(folder / ABOUT)["corpora"]
    sources = [
        Samples(TokenStream(folder / name / "validation"), stage.window, workspace.seed)
        for name in stage.corpora()
        if counts[name]["validation"] > stage.window
    ]
    return ValidationData(sources, stage.validation.samples) if sources else None


def objective(stage: Pretrain, workspace: Workspace) -> Objective:
    """What the stage's model learns to predict."""
    about = read_json(workspace.folder.path / "tokens" / ABOUT)
    kind = stage.architecture().traits.objective
    return make_objective(kind, about, workspace.seed, stage.separate_documents)
