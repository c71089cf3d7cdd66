"""A Megatron model's adapter computes what PEFT's does on the model of transformers."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from tests.ranks import layout_ranks, run_ranks
from tests.training import programs

CONFIGS: dict[str, Any] = {
    "qwen2": Qwen2Config(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        initializer_range=0.2,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(
        vocab_size=101, n_embd=32, n_layer=4, n_head=4, n_positions=16, initializer_range=0.2
    ),
}
RANK, ALPHA = 3, 5.0
WINDOWS = torch.randint(0, 101, (2, 13), generator=torch.Generator().manual_seed(1)).tolist()
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "one rank": ({}, "full"),
    "tensor 2": ({"tensor": 2}, "selective"),
    "tensor 2 by the sequence": ({"tensor": 2, "sequence": True}, "full"),
    "interleaved pipeline 2": ({"pipeline": 2, "virtual_pipeline": 2}, "full"),
}
"""Layouts, each with what is computed again."""


def by_peft(config: Any, folder: Path) -> tuple[float, dict[str, Tensor]]:
    """Writes a model and random factors; its loss, and its logits and gradients by name."""
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0),
    ).eval()
    factors = {
        name.replace(".default", ""): parameter
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    for parameter in factors.values():
        torch.nn.init.normal_(parameter, std=0.2)
    drawn = {name: parameter.detach().clone() for name, parameter in factors.items()}
    save_file(drawn, folder / "drawn.safetensors")
    windows = torch.tensor(WINDOWS)
    logits = adapted(windows[:, :-1]).logits
    loss = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    loss.backward()
    found = {name: parameter.grad for name, parameter in factors.items()}
    return float(loss), {"logits": logits.detach(), **found}


@pytest.mark.ranks
@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_and_gradients_are_peft_s(name: str, tmp_path: Path) -> None:
    expected = {model: by_peft(config, tmp_path / model) for model, config in CONFIGS.items()}
    layout, recompute = LAYOUTS[name]
    losses = run_ranks(
        programs.adapter_gradients,
        layout_ranks(layout),
        tmp_path / "ranks",
        layout=layout,
        models={model: str(tmp_path / model) for model in CONFIGS},
        windows=WINDOWS,
        adapter={"rank": RANK, "alpha": ALPHA},
        recompute=recompute,
    )
    for model, (loss, tensors) in expected.items():
        assert losses[model] == pytest.approx(loss, abs=1e-5)
        found: dict[str, Tensor] = {}
        for file in (tmp_path / model).glob("found-*.safetensors"):
            found |= load_file(file)
        assert set(found) >= set(tensors) - ({"logits"} if "pipeline" in layout else set())
        for tensor, value in found.items():
            assert (value - tensors[tensor]).abs().max() <= 1e-5, (model, tensor)
