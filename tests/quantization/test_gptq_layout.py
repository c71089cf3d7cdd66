"""Folders of GPTQ's own layout, read by a plain loop and by the library that owns it.

Shape legend: o outputs, i inputs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmscale.errors import RecipeError
from llmscale.quantization.gptq_layout import gptq_tensors
from llmscale.quantization.grids import find_grid
from llmscale.quantization.quantize import quantize
from llmscale.quantization.schemes import INT4, Quantization
from tests.quantization.small import TEXT, small_llama

GPTQ_PACKAGES = Path(sys.prefix) / "gptq"
TEXTS = [TEXT.read_text(encoding="utf-8")[:8000]]


@given(
    rows=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.sampled_from([8, 32]),
    seed=st.integers(0, 99),
)
def test_a_plain_loop_reads_the_weights_back(rows: int, groups: int, width: int, seed: int) -> None:
    weight_oi = torch.randn(8 * rows, groups * width, generator=torch.Generator().manual_seed(seed))
    grid = find_grid(weight_oi, INT4, width, torch.bfloat16)
    codes_oi = grid.codes(weight_oi)

    stored = gptq_tensors(codes_oi, grid, torch.bfloat16)

    assert torch.equal(_read(stored), grid.values(codes_oi))


def _read(stored: dict[str, Tensor]) -> Tensor:
    """As the kernels of GPTQ read a layer: (code - (zero + 1)) * scale."""
    weight_oi = torch.empty(stored["qweight"].shape[1], len(stored["g_idx"]))
    for row in range(weight_oi.shape[0]):
        for column, group in enumerate(stored["g_idx"].tolist()):
            code = int(stored["qweight"][column // 8, row]) >> (column % 8 * 4) & 15
            zero = int(stored["qzeros"][group, row // 8]) >> (row % 8 * 4) & 15
            weight_oi[row, column] = (code - zero - 1) * stored["scales"][group, row].float()
    return weight_oi


@pytest.mark.skipif(not GPTQ_PACKAGES.is_dir(), reason="make install brings GPTQModel")
@pytest.mark.parametrize("scheme", ["int4-gptq", "int4-awq", "int4-rotated-gptq"])
def test_transformers_holds_the_same_weights_in_both_layouts(scheme: str, tmp_path: Path) -> None:
    model = small_llama(tmp_path / "model")
    for layout in ("compressed-tensors", "gptq"):
        settings = Quantization.model_validate({"scheme": scheme, "layout": layout})
        figures = quantize(model, tmp_path / layout, settings, TEXTS, tokens=1024)
    assert "gptqmodel" in figures["loaded_by"]
    subprocess.run(
        [
            *(sys.executable, Path(__file__).with_name("read_gptq.py")),
            *(tmp_path / "gptq", tmp_path / "read.safetensors"),
        ],
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(GPTQ_PACKAGES)},
    )
    read = load_file(tmp_path / "read.safetensors")
    written_1sv = read.pop("logits").float()

    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "compressed-tensors", dtype=torch.float32
    )
    with torch.no_grad():
        expected_1sv = loaded(torch.arange(5, 25)[None]).logits  # decompresses
    assert (written_1sv - expected_1sv).norm() < 0.05 * expected_1sv.norm()
    assert len(read) == 14
    for name, weight_oi in read.items():
        assert torch.equal(weight_oi, loaded.get_parameter(name).to(weight_oi.dtype)), name


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"scheme": "int8-weight"}, "layout: gptq holds no int8-weight"),
        ({"scheme": "mixed"}, "layout: gptq holds no mixed"),
        ({"scheme": "int4-gptq", "group_size": 16}, "group_size: layout gptq is read in groups of"),
        ({"scheme": "int4-gptq", "symmetric": False}, "symmetric: layout gptq is written without"),
        ({"scheme": "int4-gptq", "key_value_cache": "fp8"}, "key_value_cache: layout gptq has no"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(
    settings: dict[str, object], cause: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=cause):
        asked = Quantization.model_validate({**settings, "layout": "gptq"})
        quantize(tmp_path / "no model", tmp_path / "out", asked, TEXTS)


def test_layers_that_no_kernel_takes_are_refused(tmp_path: Path) -> None:
    model = small_llama(tmp_path / "model", num_key_value_heads=1)
    asked = Quantization(scheme="int4-weight", layout="gptq")
    with pytest.raises(RecipeError, match=r"self_attn\.k_proj of .* is Linear\(.*out_features=16"):
        quantize(model, tmp_path / "out", asked)
