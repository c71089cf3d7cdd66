"""The corpus as tokens on disk: made once, by one process, before any rank starts."""

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
from llmscale.training.objectives import Objective, make_objective

ABOUT = "tokens.json"


def make_tokens(stage: Pretrain, workspace: Workspace) -> None:
    """Writes ``tokens/train`` and ``tokens/validation`` (.bin, .idx) and what they are.

    Raises:
        RecipeError: if the training split is too short for one sample, or the tokenizer
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
            "tokenizer_size": len(tokenizer),
            "end_of_text": tokenizer.eos_token_id,
            "mask_token": tokenizer.mask_token_id,
            "special_tokens": tokenizer.all_special_ids,
            **counts,
        }
        if counts["train"] <= stage.window:
            raise RecipeError(
                f"the training split has {counts['train']} tokens, too few for one sample of "
                f"{stage.window} + 1; add text or lower sequence_length"
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
    stream_tokens = read_json(workspace.folder.path / "tokens" / ABOUT)[split]
    if stream_tokens <= stage.window:
        return None
    stream = TokenStream(workspace.folder.path / "tokens" / split)
    return Samples(stream, stage.window, workspace.seed)


def objective(stage: Pretrain, workspace: Workspace) -> Objective:
    """What the stage's model learns to predict."""
    about = read_json(workspace.folder.path / "tokens" / ABOUT)
    kind = stage.architecture().traits.objective
    return make_objective(kind, about, workspace.seed, stage.separate_documents)
