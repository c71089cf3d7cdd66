"""The corpus as tokens on disk: made once, by one process, before any rank starts."""

from itertools import count, takewhile
from pathlib import Path
from typing import Any

from llmscale.artifacts import new_folder, read_json, write_json
from llmscale.data.corpus import SPLITS, read_split
from llmscale.data.samples import Samples
from llmscale.data.span_lengths import span_lengths
from llmscale.data.tokenizer import load_tokenizer, sentinel
from llmscale.data.tokens import TokenStream, write_tokens
from llmscale.errors import RecipeError
from llmscale.models.huggingface_config import read_vocabulary
from llmscale.stages.base import Workspace
from llmscale.stages.pretrain import Pretrain
from llmscale.training.objectives import Causal, Objective, Spans

ABOUT = "tokens.json"


def make_tokens(stage: Pretrain, workspace: Workspace) -> None:
    """Writes ``tokens/train`` and ``tokens/validation`` (.bin, .idx) and what they are.

    Raises:
        RecipeError: if the training split is too short for one sample.
    """
    folder = workspace.folder.path / "tokens"
    if (folder / ABOUT).exists():
        return
    tokenizer = load_tokenizer(workspace.inputs["tokenizer"])
    documents = {
        split: sum(1 for _ in read_split(workspace.inputs["corpus"], split)) for split in SPLITS
    }
    total = sum(documents.values())
    before = 0
    with new_folder(folder) as beside:
        counts: dict[str, int] = {}
        for split in SPLITS:

            def on_document(number: int, before: int = before) -> None:
                workspace.progress.update(before + number, total, "documents", "tokens")

            texts = read_split(workspace.inputs["corpus"], split)
            counts[split] = write_tokens(texts, tokenizer, beside / split, on_document)
            before += documents[split]
        about = {
            "vocabulary": _vocabulary(stage, len(tokenizer)),
            "end_of_text": tokenizer.eos_token_id,
            "padding": tokenizer.pad_token_id,
            "sentinels": _sentinels(tokenizer.get_vocab()),
            **counts,
        }
        window = _objective(stage, about, workspace).sample_length(stage.window)
        if counts["train"] <= window:
            raise RecipeError(
                f"the training split has {counts['train']} tokens, too few for one sample of "
                f"{window} + 1; add text or lower sequence_length"
            )
        write_json(beside / ABOUT, about)
    workspace.folder.add_metrics(tokens=counts)


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


def token_samples(stage: Pretrain, workspace: Workspace, split: str) -> Samples | None:
    """The samples of a split; None if it is too short for one."""
    about = read_json(workspace.folder.path / "tokens" / ABOUT)
    window = _objective(stage, about, workspace).sample_length(stage.window)
    if about[split] <= window:
        return None
    stream = TokenStream(workspace.folder.path / "tokens" / split)
    return Samples(stream, window, workspace.seed)


def objective(stage: Pretrain, workspace: Workspace) -> Objective:
    """What the stage's model learns to predict."""
    about = read_json(workspace.folder.path / "tokens" / ABOUT)
    return _objective(stage, about, workspace)


def _objective(stage: Pretrain, about: dict[str, Any], workspace: Workspace) -> Objective:
    if stage.architecture().traits.objective == "spans":
        return _spans(stage, about, workspace)
    return Causal(about["end_of_text"] if stage.separate_documents else None)


def _spans(stage: Pretrain, about: dict[str, Any], workspace: Workspace) -> Spans:
    """T5's objective.

    Raises:
        RecipeError: if the tokenizer lacks tokens that it needs.
    """
    sentinels, needed = about["sentinels"], span_lengths(stage.window).spans
    lacking = [name for name in ("padding", "end_of_text") if about[name] is None]
    if lacking or len(sentinels) < needed:
        has = f"no {lacking[0]} token" if lacking else f"{len(sentinels)} sentinels"
        raise RecipeError(
            f"{workspace.inputs['tokenizer']}: the tokenizer has {has}, but t5 needs {needed} "
            f"sentinels ({sentinel(0)}, ...), padding and an end; use another tokenizer"
        )
    return Spans(
        sequence_length=stage.window,
        sentinels=tuple(sentinels),
        padding=about["padding"],
        end=about["end_of_text"],
        seed=workspace.seed,
    )


def _sentinels(vocabulary: dict[str, int]) -> list[int]:
    """The tokens for spans taken out of texts, as many as there are without a gap."""
    names = takewhile(vocabulary.__contains__, map(sentinel, count()))
    return [vocabulary[name] for name in names]
