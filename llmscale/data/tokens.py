"""Tokens on disk, in megatron-core's indexed format (``.bin`` and ``.idx``).

Each document is a sequence that ends with the end-of-text token. Since documents lie one
behind the other, the ``.bin`` file is also one flat stream, which is how samples are cut.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

DOCUMENTS_A_BATCH = 256


def write_tokens(
    texts: Iterable[str],
    tokenizer: Any,
    prefix: Path,
    on_document: Callable[[int], None] = lambda documents: None,
) -> int:
    """Encodes texts to ``prefix.bin`` and ``prefix.idx``; returns the number of tokens."""
    end_of_text = tokenizer.eos_token_id
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(len(tokenizer)))
    total = documents = 0
    for batch in _batches(texts, DOCUMENTS_A_BATCH):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            tokens = np.array([*ids, end_of_text], dtype=builder.dtype)
            builder.add_document(tokens, [len(tokens)])
            total += len(tokens)
            documents += 1
            on_document(documents)
    builder.finalize(f"{prefix}.idx")
    return total


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, size)):
        yield batch


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
