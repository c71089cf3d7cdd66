"""What a layout and a machine make of a configuration."""

import pytest
import torch

from llmscale.models import megatron
from llmscale.models.architecture import Architecture
from llmscale.parallel.layout import Layout
from llmscale.parallel.world import resolve_device

ARCHITECTURE = Architecture(
    layers=4, hidden_size=32, attention_heads=4, ffn_size=64, sequence_length=16
)


def test_uneven_stages_reach_megatron_as_they_are_written() -> None:
    layout = Layout(pipeline=2, layers_per_stage=(1, 3))
    config = megatron.transformer_config(ARCHITECTURE, layout)
    stages = config.pipeline_model_parallel_layout.layout
    counts = [[str(layer).count("decoder") for layer in stage[0]].count(1) for stage in stages]
    assert counts == [1, 3]


def test_auto_takes_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
