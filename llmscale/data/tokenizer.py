"""Tokenizers: trained by the ``tokenizers`` library, kept as Hugging Face folders."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llmscale.errors import RecipeError

Algorithm = Literal["bpe", "wordpiece", "unigram"]

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
UNKNOWN = "<|unknown|>"
MASK = "<|mask|>"
SPECIAL_TOKENS = [END_OF_TEXT, PADDING]


def sentinel(number: int) -> str:
    """What stands for a span that is taken out of a text (T5's names)."""
    return f"<extra_id_{number}>"


def train_tokenizer(
    texts: Iterator[str],
    algorithm: Algorithm,
    vocabulary_size: int,
    *,
    mask_token: bool = False,
    sentinels: int = 0,
) -> Any:
    """Trains a tokenizer; returns it as a ``transformers`` fast tokenizer.

    BPE and Unigram work on bytes, so every text can be written and read back exactly.
    The end of a text and padding are distinct tokens (0 and 1). ``mask_token`` adds one that
    stands for tokens to be guessed, ``sentinels`` as many as stand for spans taken out.
    """
    from transformers import PreTrainedTokenizerFast

    more = {"unk_token": UNKNOWN} if algorithm == "wordpiece" else {}
    if mask_token:
        more["mask_token"] = MASK
    special = [*SPECIAL_TOKENS, *more.values(), *map(sentinel, range(sentinels))]
    tokenizer, trainer = _parts(algorithm, vocabulary_size, special)
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
        **more,
    )


def _parts(algorithm: Algorithm, size: int, special: list[str]) -> tuple[Tokenizer, Any]:
    if algorithm == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer, trainers.WordPieceTrainer(
            vocab_size=size, special_tokens=special, show_progress=False
        )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if algorithm == "bpe":
        tokenizer = Tokenizer(models.BPE())
        trainer: Any = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=size,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainer


def load_tokenizer(folder: Path) -> Any:
    """A ``transformers`` tokenizer from a folder; no code of the folder is run.

    Raises:
        RecipeError: if there is none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError):
        raise RecipeError(
            f"{folder}: no tokenizer can be read there; give a folder that has the model's "
            "tokenizer and weights"
        ) from None
