"""How likely a model finds each of some texts behind a prompt.

Shape legend: n prompts, l labels, r rows of a pass, s positions, v vocabulary.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from llmscale.errors import RecipeError
from llmscale.parallel import shares

TOKENS_A_PASS = 4096
Normalization = Literal["none", "tokens", "bytes"]


class Continuation(NamedTuple):
    """Tokens before a text, and the text's own."""

    before: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class LabelLikelihoods:
    """Log-probabilities, in nats, of labels behind prompts, and how long each label is.

    Attributes:
        nats_nl: sums over a label's tokens; 0 is certain.
        tokens_nl: the number of those tokens.
        bytes_l: the length of each label in UTF-8.
    """

    nats_nl: np.ndarray
    tokens_nl: np.ndarray
    bytes_l: np.ndarray

    def scores(self, normalization: Normalization) -> np.ndarray:
        """Log-probabilities ``[n, l]``: the sums, or their means over tokens or bytes."""
        lengths: dict[str, Any] = {"none": 1, "tokens": self.tokens_nl, "bytes": self.bytes_l}
        return self.nats_nl / lengths[normalization]


def continuation(tokenizer: Any, before: str, text: str) -> Continuation:
    """A text behind another as tokens, as lm-evaluation-harness cuts them.

    Both are encoded together, so that tokens are what they would be within a text; spaces that
    end the first belong to the second. A token the tokenizer begins texts with is there, too.
    """
    bare = before.rstrip()
    text = before[len(bare) :] + text
    whole = tokenizer(bare + text, add_special_tokens=False, verbose=False)["input_ids"]
    known = len(tokenizer(bare, add_special_tokens=False, verbose=False)["input_ids"])
    start = tokenizer("", verbose=False)["input_ids"][:1]
    if not start and not known:
        start = [tokenizer.eos_token_id]
    known = min(known, len(whole) - 1)
    return Continuation((*start, *whole[:known]), tuple(whole[known:]))


def label_likelihoods(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    labels: Sequence[str],
    places: Sequence[str],
    *,
    tokens_a_pass: int = TOKENS_A_PASS,
    on_row: Callable[[int, int], None] = lambda done, total: None,
) -> LabelLikelihoods:
    """The likelihood of each label's text behind each prompt.

    Ranks that have met share the prompts; collective then.

    Args:
        places: where each prompt is from, for errors.
        tokens_a_pass: how many tokens go through the model at once; no figure depends on it.
        on_row: is told how many of all rows are done.

    Raises:
        RecipeError: names a prompt that is longer than the model's positions, or for which it
            gives no number.
    """
    wanted = [continuation(tokenizer, prompt, label) for prompt in prompts for label in labels]
    longest = model.config.max_position_embeddings
    for number, one in enumerate(wanted):
        length = len(one.before) + len(one.tokens)
        if length > longest + 1:
            raise RecipeError(
                f"{places[number // len(labels)]}: {length:,} tokens with its label and examples, "
                f"of which the model takes {longest:,}; shorten it, or show fewer examples"
            )
    shape = (len(prompts), len(labels))

    def read(some: list[int]) -> list[np.ndarray]:
        own = [wanted[number * len(labels) + label] for number in some for label in range(shape[1])]
        return list(_nats(model, own, tokens_a_pass, on_row).reshape(len(some), shape[1]))

    nats_nl = np.array(shares.shared(list(range(len(prompts))), read)).reshape(shape)
    if not (finite_n := np.isfinite(nats_nl).all(1)).all():
        raise RecipeError(
            f"{places[finite_n.argmin()]}: the model's answer is not a number; give a model whose "
            "weights are finite"
        )
    return LabelLikelihoods(
        nats_nl,
        np.array([len(one.tokens) for one in wanted]).reshape(shape),
        np.array([len(label.encode()) for label in labels]),
    )


@torch.no_grad()
def _nats(
    model: Any,
    wanted: Sequence[Continuation],
    tokens_a_pass: int,
    on_row: Callable[[int, int], None],
) -> np.ndarray:
    """Of each continuation. Those that read the same tokens, as labels of one token do, share a
    row; rows of like length go through the model together."""
    readers: dict[tuple[int, ...], list[int]] = {}
    for number, one in enumerate(wanted):
        readers.setdefault(one.before + one.tokens[:-1], []).append(number)
    rows = sorted(readers, key=lambda row: (len(row), row))
    total, nats = len(rows), np.zeros(len(wanted))
    while rows:
        together = max(1, tokens_a_pass // len(rows[-1]))
        passed, rows = rows[-together:], rows[:-together]
        _read_pass(model, passed, wanted, readers, nats)
        on_row(total - len(rows), total)
    return nats


def _read_pass(
    model: Any,
    passed: Sequence[tuple[int, ...]],
    wanted: Sequence[Continuation],
    readers: dict[tuple[int, ...], list[int]],
    nats: np.ndarray,
) -> None:
    longest = len(passed[-1])
    first = min(len(wanted[number].before) - 1 for row in passed for number in readers[row])
    last_logits_rsv = _last_logits(model, passed, longest - first)
    for logits_sv, row in zip(last_logits_rsv, passed, strict=True):
        for number in readers[row]:
            one = wanted[number]
            begin = len(one.before) - 1 - first
            chosen_sv = logits_sv[begin : begin + len(one.tokens)].float().log_softmax(-1)
            targets = torch.tensor(one.tokens, device=chosen_sv.device)
            nats[number] = chosen_sv.gather(1, targets[:, None]).double().sum().item()


def _last_logits(model: Any, rows: Sequence[tuple[int, ...]], kept: int) -> torch.Tensor:
    """Logits at the last positions of rows padded on their right, which no token before sees."""
    longest = len(rows[-1])
    inputs_rs = torch.zeros((len(rows), longest), dtype=torch.int64)
    mask_rs = torch.zeros_like(inputs_rs)
    for number, row in enumerate(rows):
        inputs_rs[number, : len(row)] = torch.tensor(row)
        mask_rs[number, : len(row)] = 1
    takes = inspect.signature(model.forward).parameters
    fewer = {"logits_to_keep": kept} if "logits_to_keep" in takes else {}
    device = model.device
    output = model(input_ids=inputs_rs.to(device), attention_mask=mask_rs.to(device), **fewer)
    logits_rsv: torch.Tensor = output.logits[:, -kept:]
    return logits_rsv
