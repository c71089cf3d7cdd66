"""The CPU kernels are exact: values and gradients equal plain PyTorch, in double precision."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from llmscale.models.cross_entropy import LOGITS, vocabulary_cross_entropy
from llmscale.models.norms import Norm, _RootMeanSquare
from llmscale.parallel.cpu_kernels import WeightGradient, fused_rotary, swiglu

ALONE = SimpleNamespace(size=lambda: 1)


def gradients(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
    fresh = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    out = function(*fresh)
    generator = torch.Generator().manual_seed(9)
    (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum().backward()
    return [out.detach(), *(t.grad for t in fresh if t.requires_grad)]


def same(ours, plain, *inputs: torch.Tensor) -> None:
    for a, b in zip(gradients(ours, *inputs), gradients(plain, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def test_swiglu_equals_silu_of_the_gate_times_up() -> None:
    def plain(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        return F.silu(gate) * up

    same(lambda both: swiglu(both, None), plain, torch.randn(5, 3, 8, dtype=torch.double))


def test_rms_norm_equals_pytorchs() -> None:
    hidden, weight = torch.randn(4, 3, 16, dtype=torch.double), torch.randn(16, dtype=torch.double)
    same(
        lambda h, w: _RootMeanSquare.apply(h, w, 1e-5),
        lambda h, w: F.rms_norm(h, (16,), w, 1e-5),
        hidden,
        weight,
    )


@pytest.mark.parametrize("ratio", [1, 3])
def test_rotary_equals_turning_each_pair_by_its_angle(ratio: int) -> None:
    length, batch, groups, head = 6, 2, 2, 8
    frequencies = 1.0 / 100 ** (torch.arange(0, head, 2, dtype=torch.double) / head)
    half = torch.outer(torch.arange(length, dtype=torch.double), frequencies)
    angles = torch.cat([half, half], -1)[:, None, None, :]
    mixed = torch.randn(length, batch, groups, (ratio + 2) * head, dtype=torch.double)

    def plain(mixed: torch.Tensor) -> torch.Tensor:
        parts = mixed.view(length, batch, groups, ratio + 2, head)
        as_complex = torch.complex(parts[..., : head // 2], parts[..., head // 2 :])
        turned = as_complex * torch.polar(torch.ones_like(half), half)[:, None, None, None, :]
        whole = torch.cat([turned.real, turned.imag], -1)
        query = whole[..., :ratio, :].reshape(length, batch, -1, head)
        key, value = whole[..., ratio, :], parts[..., ratio + 1, :]
        return torch.cat([query, key, value], 2)

    def ours(mixed: torch.Tensor) -> torch.Tensor:
        return torch.cat(fused_rotary(mixed, angles, angles, [ratio * head, head, head]), 2)

    same(ours, plain, mixed)


def test_cross_entropy_equals_pytorchs_and_padding_gets_no_probability() -> None:
    tokens, columns, true = LOGITS // 32 + 7, 32, 29
    labels = torch.randint(0, true, (tokens,))
    logits = torch.randn(tokens, columns)

    def ours(logits: torch.Tensor) -> torch.Tensor:
        copy = logits * 1.0
        return vocabulary_cross_entropy(copy, labels, true_vocabulary=true, rank=0, group=ALONE)

    def plain(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits[:, :true], labels, reduction="none")

    for a, b in zip(gradients(ours, logits), gradients(plain, logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert gradients(ours, logits)[1][:, true:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_gradient_is_added_to_what_is_there(dtype: torch.dtype) -> None:
    inputs, output = torch.randn(7, 4, dtype=dtype), torch.randn(7, 3, dtype=dtype)
    before = torch.randn(3, 4)
    buffer = before.clone()
    WeightGradient.wgrad_gemm_accum_fp32(inputs, output, buffer)
    torch.testing.assert_close(buffer, before + (output.t() @ inputs).float())


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norm_parameters_are_summed_over_the_tensor_group_under_sequence_parallelism(
    kind: str,
) -> None:
    config = SimpleNamespace(normalization=kind, sequence_parallel=True)
    norm = Norm(config, 8)
    assert all(parameter.sequence_parallel for parameter in norm.parameters())
    hidden = torch.randn(2, 8)
    expected = F.rms_norm(hidden, (8,)) if kind == "RMSNorm" else F.layer_norm(hidden, (8,))
    torch.testing.assert_close(norm(hidden), expected, rtol=1e-4, atol=1e-4)
