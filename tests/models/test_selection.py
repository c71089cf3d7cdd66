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
    assert attention.flash_attention("cuda", torch.bfloat16) == "flash_attn_interface"
    assert attention.transformer_engine_available("cuda")
    assert attention.flash_attention("cuda", torch.float32) is None
    assert attention.flash_attention("cpu", torch.bfloat16) is None
    assert not attention.transformer_engine_available("cpu")


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize(
    ("capability", "flash"),
    [
        ((9, 0), "flash_attn_interface"),
        ((10, 0), "flash_attn"),
        ((8, 0), "flash_attn"),
        ((7, 0), None),
    ],
)
def test_each_gpu_gets_the_kernels_that_serve_it(
    capability: tuple[int, int], flash: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert attention.flash_attention("cuda", torch.float16) == flash
    assert attention.transformer_engine_available("cuda") == (flash is not None)


def test_what_is_not_installed_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert attention.flash_attention("cuda", torch.bfloat16) is None
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
