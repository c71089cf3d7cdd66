"""What different publications call FLOP: the same step differs by up to 30 % between them."""

from collections.abc import Callable
from typing import Literal

from llmscale.models.architecture import Architecture

Convention = Literal["causal", "megatron", "hardware", "six n"]


def step_flops(
    convention: Convention,
    model: Architecture,
    vocabulary: int,
    sequence_length: int,
    global_batch: int,
) -> float:
    """FLOP of a step of all GPUs together, as a publication counts."""
    return CONVENTIONS[convention](model, vocabulary, sequence_length, global_batch)


def causal(model: Architecture, vocabulary: int, length: int, batch: int) -> float:
    """6 a weight and token, and half of attention: ``6 (N - V h) + 6 L h s`` a token.

    Megatron-Bridge's performance summaries; ours too (``Architecture.flops_per_sample``).
    """
    return batch * model.flops_per_sample(vocabulary, length)


def megatron(model: Architecture, vocabulary: int, length: int, batch: int) -> float:
    """``72 B L s h^2 (1 + s / 6h + V / 12hL)``: all of attention, no recompute.

    Korthikanti et al. 2022, appendix A; MegaScale (Jiang et al. 2024); megatron-core until 0.8;
    torchtitan, whose form for other widths this is.
    """
    width = model.attention_heads * model.head
    whole = 6.0 * width * length * model.layers * length
    return batch * (model.flops_per_sample(vocabulary, length) + whole)


def hardware(model: Architecture, vocabulary: int, length: int, batch: int) -> float:
    """``96 B s L h^2 (1 + s / 6h + V / 16Lh)``: with a second forward pass, all of attention.

    Narayanan et al. 2021, section 5.1; BLOOM's logs; MT-NLG (Smith et al. 2022).
    """
    outer = 6.0 * vocabulary * model.hidden_size * length * batch
    return (megatron(model, vocabulary, length, batch) - outer) * 4 / 3 + outer


def six_n(model: Architecture, vocabulary: int, length: int, batch: int) -> float:
    """``6 N + 12 L h s`` a token, N with the embedding: MPT's tables (llm-foundry)."""
    width = model.attention_heads * model.head
    token = 6.0 * model.parameters(vocabulary) + 12.0 * model.layers * width * length
    return batch * length * token


CONVENTIONS: dict[Convention, Callable[[Architecture, int, int, int], float]] = {
    "causal": causal,
    "megatron": megatron,
    "hardware": hardware,
    "six n": six_n,
}
