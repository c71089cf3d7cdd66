"""A model under several schemes, side by side: size, speed, and how near it stays to itself.

Shape legend: n windows, s tokens in one, v vocabulary.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmscale.errors import RecipeError
from llmscale.evaluation.models import load_model
from llmscale.quantization.blocks import BlockwiseModel
from llmscale.quantization.quantize import quantize
from llmscale.quantization.schemes import SCHEMES, Quantization, SchemeName
from llmscale.quantization.sizes import folder_sizes

DECODED_TOKENS = 32
MOST_WINDOWS = 16
SPREAD = 16
"""How many times as many windows are read, at most, to take some from evenly."""


def compare(
    source: Path,
    schemes: Sequence[SchemeName],
    texts: Iterable[str],
    calibration: Callable[[], Iterable[str]],
    *,
    tokens: int,
    window: int | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """A row a scheme, after that of the model itself, which has no bits of its own kind.

    ``agreement`` is how often the likeliest next token is the model's own, ``divergence`` the mean
    Kullback-Leibler divergence of the next token's distribution from the model's, in nats.

    Args:
        calibration: gives the texts to calibrate with, anew for each scheme.

    Raises:
        RecipeError: if the texts fill no window, or a model cannot be quantized.
        MachineError: if a package is missing.
    """
    on_step(0, len(schemes) + 1)
    measure = _Measure(source, texts, window)
    blockwise = BlockwiseModel(source)
    sizes = folder_sizes(source, blockwise)
    rows = [{"scheme": "original", **sizes, "quantize_seconds": None, **measure.of(source)}]
    with tempfile.TemporaryDirectory() as scratch:
        for number, scheme in enumerate(schemes, 1):
            on_step(number, len(schemes) + 1)
            folder = Path(scratch) / scheme
            given = calibration() if SCHEMES[scheme].calibrated else None
            settings = Quantization(scheme=scheme)
            figures = quantize(source, folder, settings, given, tokens=tokens)
            rows.append({**figures, **measure.of(folder)})
    on_step(len(schemes) + 1, len(schemes) + 1)
    return rows


class _Measure:
    """Measures models against the first one."""

    def __init__(self, source: Path, texts: Iterable[str], window: int | None) -> None:
        model, tokenizer = load_model(source)
        longest = model.config.max_position_embeddings
        length = min(window or 1024, longest)
        self._windows_ns = text_windows(texts, tokenizer, length)
        self._expected: list[Tensor] = []

    @torch.no_grad()
    def of(self, folder: Path) -> dict[str, Any]:
        model, _ = load_model(folder)
        first = not self._expected
        nats = divergence = 0.0
        agreeing = scored = 0
        for number, window_s in enumerate(self._windows_ns):
            logits_sv = model(input_ids=window_s[None]).logits[0, :-1].float()
            own_sv = F.log_softmax(logits_sv, -1)
            if first:
                self._expected.append(own_sv.half())
            expected_sv = self._expected[number].float()
            nats += float(F.nll_loss(own_sv, window_s[1:], reduction="sum"))
            divergence += float(F.kl_div(own_sv, expected_sv, reduction="sum", log_target=True))
            agreeing += int((own_sv.argmax(-1) == expected_sv.argmax(-1)).sum())
            scored += len(own_sv)
        return {
            "perplexity": math.exp(min(nats / scored, 700.0)),
            "agreement": 1.0 if first else agreeing / scored,
            "divergence": 0.0 if first else max(0.0, divergence / scored),
            "decode_tokens_per_second": round(_decoding_speed(model, self._windows_ns[0]), 2),
        }


def text_windows(texts: Iterable[str], tokenizer: Any, length: int) -> Tensor:
    """Windows [n, s] of the texts to measure on, evenly, none across two texts.

    Raises:
        RecipeError: if no text fills one.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    first = [] if start is None else [start]
    step = length - len(first)
    windows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        windows += [first + ids[b : b + step] for b in range(0, len(ids) - step + 1, step)]
        if len(windows) >= SPREAD * MOST_WINDOWS:
            break
    if not windows:
        raise RecipeError(
            f"--text: is too short: no text has {length} tokens; give a longer one, or --window"
        )
    return torch.tensor(windows[:: -(-len(windows) // MOST_WINDOWS)])


def _decoding_speed(model: Any, window_s: Tensor) -> float:
    """Greedy tokens a second, one text at a time."""
    prompt = window_s[None, : min(32, len(window_s) // 2)]
    tokens = min(DECODED_TOKENS, model.config.max_position_embeddings - prompt.shape[1])
    how = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    model.generate(prompt, max_new_tokens=2, **how)
    begun = time.perf_counter()
    model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, **how)
    return tokens / (time.perf_counter() - begun)
