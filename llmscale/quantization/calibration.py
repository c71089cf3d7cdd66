"""Texts to calibrate with, as windows of tokens.

Shape legend: n windows, s tokens in one.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from llmscale.errors import RecipeError

LONGEST_WINDOW = 1024
SPREAD = 8
"""How many times the tokens wanted are read, at most, to take windows from evenly."""


def calibration_windows(
    texts: Iterable[str], tokenizer: Any, tokens: int, longest: int, where: str
) -> Tensor:
    """Windows [n, s] evenly from the first texts, as many as hold the tokens wanted.

    Texts follow each other, each after the token that begins one.

    Args:
        longest: the model's positions.
        where: what names the texts in an error.

    Raises:
        RecipeError: if the texts are none, or fill no window.
    """
    length = min(LONGEST_WINDOW, longest, tokens)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    stream: list[int] = []
    for text in texts:
        if "\0" in text:
            raise RecipeError(f"{where}: is no text (it holds zero bytes); give text files")
        if not text.strip():
            continue
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        stream += [*([] if start is None else [start]), *ids]
        if len(stream) >= SPREAD * tokens:
            break
    if not stream:
        raise RecipeError(f"{where}: holds no text; give text files")
    whole = len(stream) // length
    if whole == 0:
        raise RecipeError(
            f"{where}: is too short to calibrate with: {len(stream)} tokens, and a window has "
            f"{length}; give more text"
        )
    wanted = min(max(1, tokens // length), whole)
    begins = [place * whole // wanted * length for place in range(wanted)]
    return torch.tensor([stream[begin : begin + length] for begin in begins])
