"""What is chosen on CUDA and on the CPU, as far as a machine without a GPU can tell."""

import importlib.machinery
import importlib.util

import pytest
import torch

from llmscale.models import attention, megatron
from llmscale.models.architecture import Architecture
from llmscale.parallel.layout import Layout
from llmscale.parallel.world import resolve_device

ARCHITECTURE = Architecture(
    layers=4, hidden_size=32, attention_heads=4, ffn_size=64, sequence_length=16
)


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.machinery.ModuleSpec("found", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.mark.usefixtures("everything_installed")
def test_cuda_kernels_are_taken_on_cuda_alone() -> None:
    assert attention.flash_attention_available("cuda", torch.bfloat16)
    assert attention.transformer_engine_available("cuda")
    assert not attention.flash_attention_available("cuda", torch.float32)
    assert not attention.flash_attention_available("cpu", torch.bfloat16)
    assert not attention.transformer_engine_available("cpu")


@pytest.mark.usefixtures("everything_installed")
def test_transformer_engine_is_left_alone_on_gpus_it_does_not_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    assert not attention.transformer_engine_available("cuda")
    assert not attention.flash_attention_available("cuda", torch.float16)


def test_what_is_not_installed_is_not_taken() -> None:
    assert not attention.flash_attention_available("cuda", torch.bfloat16)
    assert not attention.transformer_engine_available("cuda")
    assert not megatron.apex_accumulates_gradients()


def test_the_configuration_differs_between_devices_only_in_kernels() -> None:
    cpu, cuda = (
        megatron.transformer_config(ARCHITECTURE, Layout(), device=device)
        for device in ("cpu", "cuda")
    )
    differing = {
        name for name in vars(cpu) if repr(getattr(cpu, name)) != repr(getattr(cuda, name))
    }
    assert differing == {
        "bias_dropout_fusion",
        "deallocate_pipeline_outputs",
        "fused_single_qkv_rope",
        "gradient_accumulation_fusion",
    }


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
