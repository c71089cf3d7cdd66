"""Span corruption (Raffel et al. 2020, section 3.3): gaps in a text, and what fills them."""

import numpy as np

from llmscale.data.span_lengths import SpanLengths


def span_starts_and_ends(lengths: SpanLengths, generator: np.random.Generator) -> np.ndarray:
    """Where the pieces of a text lie, ``[spans, 2]``: kept and lost tokens in turn.

    All ways to cut the kept tokens, and those to cut the lost ones, are equally likely.
    """
    kept = _pieces(lengths.text - lengths.noise, lengths.spans, generator)
    lost = _pieces(lengths.noise, lengths.spans, generator)
    return np.stack([kept, lost], 1).cumsum().reshape(-1, 2)


def _pieces(total: int, pieces: int, generator: np.random.Generator) -> np.ndarray:
    """Lengths of at least one that add up to ``total``: ``[pieces]``."""
    cuts = np.sort(generator.choice(total - 1, pieces - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def corrupted(
    text: np.ndarray, spans: np.ndarray, sentinels: np.ndarray, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """The input and the target made of a text.

    Args:
        text: its tokens.
        spans: where each piece to take out starts and ends, ``[spans, 2]``.
        sentinels: the token that stands for each.
        end: the token that closes both.
    """
    inputs, targets, before = [], [], 0
    for (start, stop), sentinel in zip(spans, sentinels, strict=True):
        inputs += [text[before:start], [sentinel]]
        targets += [[sentinel], text[start:stop]]
        before = stop
    return (
        np.concatenate([*inputs, text[before:], [end]]),
        np.concatenate([*targets, [end]]),
    )
