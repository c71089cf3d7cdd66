"""Tokens on disk, in megatron-core's indexed format (``.bin`` and ``.idx``).

Each document is a sequence that ends with the end-of-text token. Since documents lie one
behind the other, the ``.bin`` file is also one flat stream, which is how samples are cut.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

DOCUMENTS_A_BATCH, CHARACTERS_A_BATCH = 256, 2**20


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts as many at a time as are encoded together."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == DOCUMENTS_A_BATCH or characters >= CHARACTERS_A_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encoded(texts: list[str], tokenizer: Any) -> list[np.ndarray]:
    """The tokens of each text and the one that ends it, in the smallest type that holds them."""
    dtype = DType.optimal_dtype(len(tokenizer))
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [np.array([*own, tokenizer.eos_token_id], dtype=dtype) for own in ids]


def write_tokens(documents: Iterable[np.ndarray], vocabulary: int, prefix: Path) -> int:
    """Writes encoded documents to ``prefix.bin`` and ``prefix.idx``; returns their tokens."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocabulary))
    total = 0
    for tokens in documents:
        builder.add_document(tokens, [len(tokens)])
        total += len(tokens)
    builder.finalize(f"{prefix}.idx")
    return total


class TokenStream:
    """The tokens of an indexed dataset as one flat, memory-mapped array."""

    def __init__(self, prefix: Path) -> None:
        dataset = IndexedDataset(str(prefix))
        dtype = dataset.index.dtype
        tokens = int(dataset.index.sequence_lengths.sum())
        self._tokens = np.memmap(f"{prefix}.bin", dtype=dtype, mode="r", shape=(tokens,))

    def __len__(self) -> int:
        return len(self._tokens)

    def window(self, start: int, length: int) -> np.ndarray:
        """``length`` tokens from ``start`` on, as int64."""
        return np.asarray(self._tokens[start : start + length], dtype=np.int64)
