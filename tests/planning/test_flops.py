"""The conventions of FLOP as their publications write them."""

import pytest

from llmscale.models.architecture import Architecture
from llmscale.planning.flops import step_flops
from tests.planning.cases import gpt

L, H, S, V, B = 96, 12288, 2048, 51200, 1536
GPT3 = gpt(L, H, 96)


def test_hardware_flop_are_narayanans() -> None:
    expected = 96 * B * S * L * H**2 * (1 + S / (6 * H) + V / (16 * L * H))
    assert step_flops("hardware", GPT3, V, S, B) == pytest.approx(expected, rel=1e-9)


def test_model_flop_are_korthikantis() -> None:
    expected = 72 * B * S * L * H**2 * (1 + S / (6 * H) + V / (12 * L * H))
    assert step_flops("megatron", GPT3, V, S, B) == pytest.approx(expected, rel=1e-9)


def test_causal_flop_are_megatron_bridges() -> None:
    llama = Architecture(
        family="llama",
        layers=80,
        hidden_size=8192,
        attention_heads=64,
        key_value_heads=8,
        ffn_size=28672,
        sequence_length=8192,
    )
    # a row of its 26.04 table: 1,633 tokens/s and 734 TFLOP/s a GPU
    token = step_flops("causal", llama, 128256, 8192, 1) / 8192
    assert 1633 * token == pytest.approx(734e12, rel=0.01)


def test_mpts_flop_are_six_n_and_all_of_attention() -> None:
    mpt = gpt(32, 4096, 32).model_copy(update={"sequence_length": 2048})
    # llm-foundry's table: MPT 7b at 2,048 tokens, 10,643 tokens/s and 459 TFLOP/s a GPU
    token = step_flops("six n", mpt, 50368, 2048, 1) / 2048
    assert 10643 * token == pytest.approx(459e12, rel=0.01)
