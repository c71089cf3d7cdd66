"""Experts over two ranks equal a plain loop over experts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from llmscale.models.weights import initial_tensor
from tests.ranks import run_ranks
from tests.verify import programs

HIDDEN, FFN, EXPERTS, CHOSEN, SEED = 32, 48, 4, 2, 3
MODEL = {
    "family": "mixtral",
    "layers": 1,
    "hidden_size": HIDDEN,
    "attention_heads": 4,
    "ffn_size": FFN,
    "experts": EXPERTS,
    "experts_per_token": CHOSEN,
    "balance_coefficient": 0.0,
    "sequence_length": 12,
    "initial_std": 0.3,
}


def dense(tokens: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each token through each expert, and the outputs of the chosen ones by their weights."""
    logits = tokens @ weights["gate"].T
    best = logits.topk(CHOSEN, dim=-1)
    share = torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(-1))
    output = torch.zeros_like(tokens)
    for expert in range(EXPERTS):
        gate, down, up = (weights[f"{expert}.{name}"] for name in ("w1", "w2", "w3"))
        hidden = F.silu(tokens @ gate.T) * (tokens @ up.T)
        output = output + share[..., expert : expert + 1] * (hidden @ down.T)
    return output


@pytest.mark.ranks
def test_experts_over_two_ranks_equal_a_dense_loop(tmp_path: Path) -> None:
    inputs = torch.randn(12, 4, HIDDEN, generator=torch.Generator().manual_seed(1))
    save_file({"inputs": inputs}, tmp_path / "inputs.safetensors")
    run_ranks(
        programs.experts_and_a_dense_loop,
        2,
        tmp_path / "run",
        layout={"data": 2, "expert": 2},
        model=MODEL,
        seed=SEED,
        inputs=str(tmp_path / "inputs.safetensors"),
        outputs=str(tmp_path / "outputs"),
    )
    prefix, output_std = "model.layers.0.block_sparse_moe", 0.3 / 2**0.5
    shapes = {"w1": ((FFN, HIDDEN), 0.3), "w2": ((HIDDEN, FFN), output_std)}
    shapes["w3"] = shapes["w1"]
    weights = {
        f"{expert}.{name}": initial_tensor(
            f"{prefix}.experts.{expert}.{name}.weight", shape, std, SEED
        ).requires_grad_()
        for expert in range(EXPERTS)
        for name, (shape, std) in shapes.items()
    }
    gate = initial_tensor(f"{prefix}.gate.weight", (EXPERTS, HIDDEN), 0.3, SEED)
    weights["gate"] = gate.requires_grad_()
    found = [load_file(tmp_path / f"outputs-{rank}.safetensors") for rank in range(2)]
    router_gradient = torch.zeros_like(weights["gate"])
    for rank, ours in enumerate(found):
        own = inputs[:, rank::2].clone().requires_grad_()
        expected = dense(own, weights)
        (expected * torch.arange(expected.numel()).view_as(expected).cos()).sum().backward()
        torch.testing.assert_close(ours["output"], expected.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours["inputs"], own.grad, atol=1e-5, rtol=1e-4)
        router_gradient += ours[f"rank{rank}"]
    torch.testing.assert_close(router_gradient, weights["gate"].grad, atol=1e-4, rtol=1e-4)
    gradients = {n: t for ours in found for n, t in ours.items() if n.startswith("model.")}
    assert len(gradients) == EXPERTS * 3
    for name, gradient in gradients.items():
        expert, part = name.split(".experts.")[1].split(".")[:2]
        torch.testing.assert_close(gradient, weights[f"{expert}.{part}"].grad, atol=1e-4, rtol=1e-4)
