"""Scales of cached keys and values are those of the calibration, and are loaded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

from llmscale.errors import RecipeError
from llmscale.evaluation.models import load_model
from llmscale.parallel import probes
from llmscale.quantization.calibration import calibration_windows
from llmscale.quantization.quantize import quantize
from llmscale.quantization.schemes import CacheNumber, Quantization, SchemeName
from tests.quantization.small import TEXT, small_llama

LETTERS = TEXT.read_text(encoding="utf-8")[:8000]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.mark.parametrize(
    ("scheme", "number", "greatest_code"),
    [
        ("int8-weight", "fp8", 448.0),
        ("int4-awq-gptq", "int8", 127.5),
        ("int4-rotated-gptq", "fp8", 448.0),
    ],
)
def test_scales_are_the_greatest_keys_and_values_of_the_calibration(
    scheme: SchemeName,
    number: CacheNumber,
    greatest_code: float,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against what the folder's own model, its weights quantized, puts into a plain cache."""
    monkeypatch.setattr(probes, "quick_bf16", lambda: False)  # as the plain cache's model computes
    out = tmp_path / "out"
    settings = Quantization(scheme=scheme, key_value_cache=number)
    quantize(model, out, settings, [LETTERS], tokens=1024)

    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    attentions = [block.self_attn for block in loaded.model.layers]
    for attention in attentions:
        attention.quantization_enabled = False
    _, tokenizer = load_model(model)
    greatest = torch.zeros(len(attentions), 2)
    for window in calibration_windows([LETTERS], tokenizer, 1024, 64, "text"):
        cache = DynamicCache(config=loaded.config)
        with torch.no_grad():
            loaded(window[None], past_key_values=cache, use_cache=True)
        for number_, layer in enumerate(cache.layers):
            seen = torch.stack([layer.keys.abs().max(), layer.values.abs().max()])
            greatest[number_] = torch.maximum(greatest[number_], seen)

    for number_, attention in enumerate(attentions):
        stored = load_file(out / f"block-{number_:05d}.safetensors")
        for place, name in enumerate(("k_scale", "v_scale")):
            scale = stored[f"model.layers.{number_}.self_attn.{name}"]
            assert (scale.dtype, scale.shape) == (torch.bfloat16, (1,))
            expected = float(greatest[number_, place]) / greatest_code
            assert float(scale) == pytest.approx(expected, rel=0.01)
            assert torch.equal(getattr(attention, name).float(), scale.float())


def test_the_loaded_model_rounds_its_cache_and_stays_near(model: Path, tmp_path: Path) -> None:
    def logits(out: Path, **more: object) -> torch.Tensor:
        if not out.exists():
            settings = Quantization(scheme="int8-weight", **more)  # type: ignore[arg-type]
            quantize(model, out, settings, [LETTERS], tokens=1024)
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        with torch.no_grad():
            return loaded(torch.arange(5, 60)[None], use_cache=True).logits

    plain = logits(tmp_path / "plain")
    rounded = logits(tmp_path / "rounded", key_value_cache="fp8")
    assert not torch.equal(rounded, plain)
    assert (rounded - plain).norm() / plain.norm() < 0.2


def test_what_has_no_such_scales_is_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match="key_value_cache: nf4 has no scales for it; remove it"):
        quantize(model, out, Quantization(scheme="nf4", key_value_cache="int8"), [LETTERS])
    with pytest.raises(RecipeError, match="key_value_cache int8 is calibrated with texts"):
        quantize(model, out, Quantization(scheme="int8-weight", key_value_cache="int8"))
    assert not list(tmp_path.iterdir())
