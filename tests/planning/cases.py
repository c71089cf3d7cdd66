"""Setups of published runs that several tests look at."""

from pathlib import Path

from llmscale.models.architecture import Architecture
from llmscale.planning.hardware import DEVICES
from llmscale.planning.setup import Setup

PUBLISHED = Path(__file__).with_name("published_results.csv")
"""476 rows of ten publications; the constants are fitted to them."""
UNSEEN = Path(__file__).with_name("nemo_24_12.csv")
"""https://docs.nvidia.com/nemo-framework/user-guide/24.12/nemotoolkit/performance/
performance_summary.html; no constant was fitted to it."""


def gpt(layers: int, hidden: int, heads: int) -> Architecture:
    """As in Megatron's papers."""
    return Architecture(
        family="gpt2",
        layers=layers,
        hidden_size=hidden,
        attention_heads=heads,
        ffn_size=4 * hidden,
        sequence_length=2048,
    )


KORTHIKANTI = {
    "22B": (gpt(48, 6144, 64), 1, 1, 4),
    "175B": (gpt(96, 12288, 96), 8, 3, 1),
    "530B": (gpt(105, 20480, 128), 35, 3, 1),
    "1T": (gpt(128, 25600, 160), 64, 1, 1),
}
"""Korthikanti et al. 2022, table 3: model, pipeline, virtual pipeline, micro-batch; tensor 8."""


def megatron_2022(name: str, **changed: object) -> Setup:
    """A run of Korthikanti et al.: A100, attention's scores in memory, dropout."""
    model, pipeline, virtual, micro = KORTHIKANTI[name]
    settings: dict[str, object] = {
        "architecture": model,
        "vocabulary": 51200,
        "sequence_length": 2048,
        "device": DEVICES["A100-80GB"],
        "gpus": 8 * pipeline,
        "global_batch": {"22B": 4, "175B": 64, "530B": 280, "1T": 512}[name],
        "micro_batch": micro,
        "tensor": 8,
        "pipeline": pipeline,
        "virtual_pipeline": virtual,
        "kernels": "unfused",
        "dropout": True,
        "tensor_overlap": "backward",
        "scattered_sends": True,
    }
    return Setup(**{**settings, **changed})  # type: ignore[arg-type]


def llama_70b(**changed: object) -> Setup:
    """Llama 3 70B on 128 H100 as llmscale trains it."""
    model = Architecture(
        family="llama",
        layers=80,
        hidden_size=8192,
        attention_heads=64,
        key_value_heads=8,
        ffn_size=28672,
        sequence_length=8192,
    )
    settings: dict[str, object] = {
        "architecture": model,
        "vocabulary": 128256,
        "sequence_length": 8192,
        "device": DEVICES["H100-80GB"],
        "gpus": 128,
        "global_batch": 512,
        "tensor": 4,
        "pipeline": 4,
        "data": 8,
        "sequence_parallel": True,
        "sharding": "optimizer",
        "tensor_overlap": "backward",
    }
    return Setup(**{**settings, **changed})  # type: ignore[arg-type]
