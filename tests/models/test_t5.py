"""T5 in and out of Hugging Face folders, and its relative positions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from llmscale.models.huggingface_config import read_architecture
from tests.models.test_huggingface import tensors
from tests.ranks import layout_ranks, run_ranks
from tests.training import programs

SHAPE: dict[str, Any] = {
    "vocab_size": 301,
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 3,
    "num_decoder_layers": 5,
    "num_heads": 4,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 20,
}
VERSIONS: dict[str, dict[str, Any]] = {
    "1.0": {"feed_forward_proj": "relu"},
    "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tensor": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"pipeline": 2, "layers_per_stage": [2, 6]},
    {"tensor": 2, "sequence": True, "pipeline": 2, "data": 2},
    {"context": 2},
]


def saved(folder: Path, version: str) -> T5ForConditionalGeneration:
    """A model with random weights and norms, in a folder; loaded again, as transformers 5
    ties tables until it finds two in a file."""
    torch.manual_seed(0)
    config = T5Config(**SHAPE, **VERSIONS[version])
    model = T5ForConditionalGeneration(config)
    if version == "1.1":
        model.lm_head.weight = torch.nn.Parameter(torch.randn(301, 48) * 0.2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return loaded(folder)


def loaded(folder: Path) -> T5ForConditionalGeneration:
    model, about = T5ForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(about.values()), about
    return model.eval()


@pytest.mark.ranks
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_logits_equal_those_of_transformers_and_the_export_is_exact(
    layout: dict[str, Any], tmp_path: Path
) -> None:
    models = {version: saved(tmp_path / version / "in", version) for version in VERSIONS}
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(0, 301, (2, 32), generator=generator)
    targets = torch.randint(0, 301, (2, 16), generator=generator)
    cases = [
        {
            "source": str(tmp_path / version / "in"),
            "inputs": inputs.tolist(),
            "targets": targets.tolist(),
            "file": str(tmp_path / version / "logits.safetensors"),
            "exported": str(tmp_path / version / "out"),
        }
        for version in VERSIONS
    ]
    ranks = layout_ranks(layout)
    run_ranks(programs.huggingface_round_trips, ranks, tmp_path / "run", layout=layout, cases=cases)
    for version, model in models.items():
        folder = tmp_path / version
        with torch.no_grad():
            expected = model(input_ids=inputs, decoder_input_ids=targets).logits
        ours = load_file(folder / "logits.safetensors")["logits"]
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0, msg=version)
        before, after = tensors(folder / "in"), tensors(folder / "out")
        assert before.keys() == after.keys(), version
        assert all(before[n].equal(after[n]) for n in before), version
        with torch.no_grad():
            again = loaded(folder / "out")(input_ids=inputs, decoder_input_ids=targets).logits
        assert again.equal(expected), version


@pytest.mark.parametrize("version", VERSIONS)
def test_parameters_are_counted_as_transformers_counts_them(version: str, tmp_path: Path) -> None:
    model = saved(tmp_path, version)
    assert read_architecture(tmp_path).parameters(301) == model.num_parameters()


@settings(deadline=None)
@given(
    causal=st.booleans(),
    buckets=st.integers(2, 40).map(lambda half: 2 * half),
    beyond=st.integers(1, 200),
    distances=st.lists(st.integers(-1000, 1000), min_size=1, max_size=50),
)
def test_buckets_of_distances_are_those_of_transformers(
    causal: bool, buckets: int, beyond: int, distances: list[int]
) -> None:
    from llmscale.models.relative_positions import relative_buckets

    there = torch.tensor(distances)
    largest = buckets // 2 + beyond
    ours = relative_buckets(there, causal=causal, buckets=buckets, largest_distance=largest)
    theirs = T5Attention._relative_position_bucket(there, not causal, buckets, largest)
    assert ours.tolist() == theirs.tolist()
