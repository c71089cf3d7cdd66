"""A Hugging Face folder that an adapter is merged into gives what the two give together."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmscale.training.adapters import merged_weights, plain_model, quantization, with_adapter
from llmscale.training.settings import Adapter
from tests.training.test_low_rank import CONFIGS

CASES = [
    *((family, method) for family in CONFIGS for method in ("lora", "ia3")),
    ("qwen2", "qlora"),  # gpt2's is refused with the recipe
]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_the_merged_folder_gives_the_adapted_model_s_logits(
    family: str, method: Any, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_config(CONFIGS[family])
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    base.save_pretrained(tmp_path / "base")
    adapter = Adapter(method=method)
    four_bits = quantization(adapter, "fp32", "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **four_bits)
    model = with_adapter(loaded, adapter, seed=1).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 1.0 if method == "ia3" else 0.0, 0.2)
    weights = {
        name: whole.clone() for name, whole in merged_weights(model, lambda _: nullcontext())
    }
    plain_model(model).save_pretrained(tmp_path / "merged", state_dict=weights)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not hasattr(merged.config, "quantization_config")
    tokens = torch.arange(16)[None]
    expected = model(tokens).logits
    assert (merged(tokens).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert (before(tokens).logits - expected).abs().max() > 0.1
