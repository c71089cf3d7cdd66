"""CUDA answered on the CPU: only inside the context, only for megatron-core, and loudly."""

import pytest
import torch

from llmscale.errors import MachineError
from llmscale.parallel import cuda_on_cpu as module
from llmscale.parallel.cuda_on_cpu import cuda_on_cpu


def test_leaving_the_context_undoes_everything() -> None:
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer import mlp

    before = (torch.Tensor.cuda, torch.Tensor.type, clip_grads.torch, mlp.bias_swiglu_impl)
    fusion = layers._grad_accum_fusion_available
    with cuda_on_cpu():
        assert clip_grads.torch is not torch
        assert clip_grads.torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(1).cuda().device.type == "cpu"
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert before == (torch.Tensor.cuda, torch.Tensor.type, clip_grads.torch, mlp.bias_swiglu_impl)
    assert layers._grad_accum_fusion_available == fusion
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_only_megatron_sees_it() -> None:
    with cuda_on_cpu():
        assert not torch.cuda.is_available() or torch.cuda.current_device() is not None
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(1, device="cuda")


def test_an_untested_megatron_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core

    monkeypatch.setattr(megatron.core, "__version__", "0.99.0")
    with pytest.raises(MachineError, match=r"0\.99\.0 was not tested.*pip install"), cuda_on_cpu():
        pass


def test_streams_and_events_are_done_when_they_return() -> None:
    cuda = module._cuda_namespace(module.CPU)
    stream = cuda.Stream()
    stream.wait_stream(cuda.current_stream())
    event = stream.record_event()
    event.wait()
    with cuda.stream(stream):
        pass
