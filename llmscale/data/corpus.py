"""A corpus: one JSON-lines file a split, written once and streamed ever after."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, get_args

from llmscale.artifacts import sync_file
from llmscale.data.documents import Document, cleaned
from llmscale.data.split import position, validation_threshold

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)


def split_file(folder: Path, split: str) -> Path:
    """Where a split of the corpus in ``folder`` lies."""
    return folder / f"{split}.jsonl"


def read_split(folder: Path, split: str) -> Iterator[str]:
    """The texts of a split, in their written order."""
    with split_file(folder, split).open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def write_corpus(
    documents: Callable[[], Iterable[Document]],
    folder: Path,
    validation_fraction: float,
    seed: int,
) -> dict[str, dict[str, int]]:
    """Cleans, splits and writes documents; equal texts are written once.

    A document goes to validation if its position is below the fraction. Where that leaves
    validation empty (few, long documents) the document of lowest position goes there.

    Returns:
        For each split: documents, characters and bytes; and the duplicates left out.
    """
    texts = (cleaned(document.text) for document in documents())
    threshold = validation_threshold(
        validation_fraction, (position(text, seed) for text in texts if text.strip())
    )
    counts: dict[str, dict[str, int]] = {
        split: {"documents": 0, "characters": 0, "bytes": 0} for split in SPLITS
    }
    seen: set[float] = set()
    duplicates = 0
    with ExitStack() as stack:
        files = {
            split: stack.enter_context(split_file(folder, split).open("w", encoding="utf-8"))
            for split in SPLITS
        }
        for document in documents():
            text = cleaned(document.text)
            place = position(text, seed)
            if not text.strip():
                continue
            if place in seen:
                duplicates += 1
                continue
            seen.add(place)
            split: Split = "validation" if place < threshold else "train"
            line = {"text": text, "source": document.source}
            files[split].write(json.dumps(line, ensure_ascii=False) + "\n")
            counts[split]["documents"] += 1
            counts[split]["characters"] += len(text)
            counts[split]["bytes"] += len(text.encode())
    for split in SPLITS:
        sync_file(split_file(folder, split))
    counts["left_out"] = {"duplicates": duplicates}
    return counts
