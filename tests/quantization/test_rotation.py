"""A rotation is there, and nothing that the model says is another for it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from llmscale.errors import RecipeError
from llmscale.quantization.blocks import BlockwiseModel
from llmscale.quantization.quantize import quantize
from llmscale.quantization.rotation import orthogonal, rotate
from llmscale.quantization.schemes import Quantization
from tests.quantization.small import TEXT, small_llama


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(5, 60)[None]).logits


def rotated_logits(folder: Path, out: Path) -> torch.Tensor:
    """Of a model with the rotated tensors, not quantized, by transformers."""
    blockwise = BlockwiseModel(folder)
    rotate(blockwise)
    out.mkdir()
    blockwise.config.save_pretrained(out)
    tensors = {name: blockwise.weights[name] for name in blockwise.weights}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))


@pytest.mark.parametrize("size", [1, 7, 16, 48, 576])
def test_the_matrix_is_orthogonal_at_any_width(size: int) -> None:
    turn = orthogonal(size, seed=3)
    assert torch.allclose(turn @ turn.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(turn, orthogonal(size, seed=3))
    if size > 1:
        assert not torch.equal(turn, orthogonal(size, seed=4))


def test_a_direction_is_spread_over_all_columns() -> None:
    # A Hadamard matrix of 64 puts 1/8 into each; the random part of 9 has no entry near 1.
    assert torch.equal(orthogonal(64, 0).abs(), torch.full((64, 64), 0.125, dtype=torch.float64))
    assert orthogonal(576, 0).abs().max() < 0.125


@pytest.mark.parametrize("tied", [True, False])
def test_the_rotated_model_says_the_same(tied: bool, tmp_path: Path) -> None:
    folder = small_llama(tmp_path / "llama", tied=tied, hidden_size=48, intermediate_size=80)
    before = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    after = rotated_logits(folder, tmp_path / "rotated")
    assert (after - before).abs().max() < 1e-4

    name = "model.layers.1.self_attn.o_proj.weight"
    plain, turned = (
        load_file(path / "model.safetensors") for path in (folder, tmp_path / "rotated")
    )
    assert not torch.allclose(plain[name], turned[name], atol=0.01)
    assert torch.allclose(plain[name].norm(), turned[name].norm())


def test_biases_turn_with_what_they_are_added_to(tmp_path: Path) -> None:
    torch.manual_seed(6)
    config = Qwen2Config(
        vocab_size=80,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand(len(parameter)))
    model.save_pretrained(tmp_path / "qwen")
    assert (rotated_logits(tmp_path / "qwen", tmp_path / "out") - logits(model)).abs().max() < 1e-4


def test_the_folder_has_a_head_of_its_own(tmp_path: Path) -> None:
    folder = small_llama(tmp_path / "llama")
    letters = TEXT.read_text(encoding="utf-8")[:8000]
    out = tmp_path / "out"
    quantize(folder, out, Quantization(scheme="int4-rotated-gptq"), [letters], tokens=1024)

    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert {"lm_head.weight", "model.norm.weight"} <= set(load_file(out / "others.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert (logits(loaded) - expected).norm() / expected.norm() < 0.6


def test_a_family_whose_tensors_are_not_known_is_refused(tmp_path: Path) -> None:
    blockwise = BlockwiseModel(small_llama(tmp_path / "llama"))
    blockwise.config.model_type = "gpt2"
    with pytest.raises(RecipeError, match="gpt2 cannot be rotated, only llama, mistral, qwen2, q"):
        rotate(blockwise)
