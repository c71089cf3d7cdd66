"""What is chosen on CUDA and on the CPU, as far as a machine without a GPU can tell."""

import importlib.machinery
import importlib.util

import pytest
import torch

from llmscale.errors import MachineError
from llmscale.models.architecture import Architecture
from llmscale.models.megatron import layer_spec, transformer_config
from llmscale.parallel import probes
from llmscale.parallel.layout import Layout

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
    assert probes.flash_attention("cuda", torch.bfloat16) == "flash_attn_interface"
    assert probes.transformer_engine("cuda")
    assert probes.flash_attention("cuda", torch.float32) is None
    assert probes.flash_attention("cpu", torch.bfloat16) is None
    assert not probes.transformer_engine("cpu")
    assert probes.fp8_recipe("cpu") is None
    assert probes.overlapped_gradient_reduction("cuda")
    assert not probes.overlapped_gradient_reduction("cpu")


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize(
    ("capability", "flash", "fp8"),
    [
        ((10, 0), "flash_attn", "mxfp8"),
        ((9, 0), "flash_attn_interface", "delayed"),
        ((8, 9), "flash_attn", "delayed"),
        ((8, 0), "flash_attn", None),
        ((7, 0), None, None),
    ],
)
def test_each_gpu_gets_what_serves_it(
    capability: tuple[int, int],
    flash: str | None,
    fp8: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert probes.flash_attention("cuda", torch.float16) == flash
    assert probes.transformer_engine("cuda") == (flash is not None)
    assert probes.fp8_recipe("cuda") == fp8


def test_what_is_not_installed_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert probes.flash_attention("cuda", torch.bfloat16) is None
    assert not probes.transformer_engine("cuda")
    assert probes.fp8_recipe("cuda") is None
    assert not probes.gradient_accumulation_kernel()


def test_fp8_without_a_gpu_for_it_is_refused_in_one_line() -> None:
    with pytest.raises(MachineError, match="precision fp8 needs"):
        probes.require_precision("fp8", "cpu")
    probes.require_precision("bf16", "cpu")


def test_the_configuration_differs_between_devices_only_in_kernels() -> None:
    cpu, cuda = (
        transformer_config(ARCHITECTURE, Layout(), device=device) for device in ("cpu", "cuda")
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


def test_core_attention_and_router_are_ours_beside_megatrons_own_layers() -> None:
    from llmscale.models.attention import CoreAttention
    from llmscale.models.router import BalancedRouter

    mixtral = ARCHITECTURE.model_copy(update={"family": "mixtral", "experts": 4})
    spec = layer_spec(mixtral, "cuda")
    assert spec.submodules.self_attention.submodules.core_attention is CoreAttention
    assert spec.submodules.mlp.submodules.router is BalancedRouter


def test_a_cpu_multiplies_in_bf16_where_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for told, expected in (
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"avx512_bf16": False}, False),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda told=told: told)
        assert probes.quick_bf16() is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # a release that cannot tell
    assert probes.quick_bf16() is False
