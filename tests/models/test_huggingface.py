"""Hugging Face weights in and out, exactly, at any layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.ranks import layout_ranks, run_ranks
from tests.training import programs

SIZES: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
OWN_HEADS: dict[str, Any] = {**SIZES, "num_attention_heads": 4, "head_dim": 16}
TINY = {
    "llama": LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "llama, tied, biased, scaled rotary": LlamaConfig(
        **OWN_HEADS,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "qwen2": Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**OWN_HEADS, num_key_value_heads=2, tie_word_embeddings=False),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": GPT2Config(vocab_size=301, n_embd=48, n_layer=4, n_head=6, n_positions=64),
    "bert": BertConfig(**SIZES),
}
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tensor": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"tensor": 2, "pipeline": 2, "data": 2},
    {"context": 2},
]
EXPERT_LAYOUTS: list[dict[str, Any]] = [
    {"expert": 2, "data": 2},
    {"tensor": 2, "sequence": True, "expert": 2, "data": 2, "pipeline": 2},
    {"context": 2, "expert": 2},
]
DENSE = [name for name in TINY if name != "mixtral"]
CASES: list[tuple[dict[str, Any], list[str]]] = [
    *((layout, DENSE) for layout in LAYOUTS),
    *((layout, ["mixtral"]) for layout in [{}, *EXPERT_LAYOUTS]),
    ({"tensor": 2, "sequence": True, "pipeline": 2, "data": 2}, ["bert"]),
]
"""Layouts, each with the models that go in and out there, in one world."""


def loader(config: Any) -> Any:
    """The class that gives a model of this configuration its output layer."""
    return AutoModelForMaskedLM if config.model_type == "bert" else AutoModelForCausalLM


def saved(folder: Path, config: Any) -> Any:
    """A model with random weights, biases and norms, in a folder."""
    torch.manual_seed(0)
    model = loader(config).from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("layout", "names"), CASES, ids=lambda value: value[0] if isinstance(value, list) else None
)
def test_logits_equal_those_of_transformers_and_the_export_is_exact(
    layout: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    tokens = torch.randint(0, 301, (2, 32), generator=torch.Generator().manual_seed(1))
    models = {name: saved(tmp_path / name / "in", TINY[name]) for name in names}
    cases = [
        {
            "source": str(tmp_path / name / "in"),
            "tokens": tokens.tolist(),
            "file": str(tmp_path / name / "logits.safetensors"),
            "exported": str(tmp_path / name / "out"),
        }
        for name in names
    ]
    ranks = layout_ranks(layout)
    run_ranks(programs.huggingface_round_trips, ranks, tmp_path / "run", layout=layout, cases=cases)
    for name, model in models.items():
        check_round_trip(name, model, tokens, tmp_path / name)


def check_round_trip(name: str, model: Any, tokens: torch.Tensor, folder: Path) -> None:
    """What ranks made of the model in ``in``: its logits, and itself in ``out``."""
    with torch.no_grad():
        expected = model(tokens).logits
    ours = load_file(folder / "logits.safetensors")["logits"]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0, msg=name)
    before, after = tensors(folder / "in"), tensors(folder / "out")
    assert before.keys() == after.keys(), name
    assert all(before[n].equal(after[n]) for n in before), name
    loaded, found = loader(model.config).from_pretrained(
        folder / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(found.values()), (name, found)
    with torch.no_grad():
        assert loaded(tokens).logits.equal(expected), name


@pytest.mark.ranks
@pytest.mark.slow
def test_a_real_llama_checkpoint_goes_in_trains_and_comes_out(
    smollm2: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    text = "The capital of France is Paris, and the capital of Italy is"
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokens = torch.tensor([tokenizer(text)["input_ids"]])
    losses = run_ranks(
        programs.huggingface_round_trip,
        6,
        tmp_path / "run",
        source=str(smollm2),
        layout={"tensor": 3, "pipeline": 2},
        tokens=tokens.tolist(),
        file=str(tmp_path / "logits.safetensors"),
        exported=str(tmp_path / "out"),
        steps=2,
        trained=str(tmp_path / "trained"),
    )
    with torch.no_grad():
        expected = model(tokens).logits
    ours = load_file(tmp_path / "logits.safetensors")["logits"]
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)
    assert tokenizer.decode(ours[0, -1].argmax()).strip() == "Rome"
    assert losses[1] < losses[0]
    before, after = tensors(smollm2), tensors(tmp_path / "out")
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert all(before[n].equal(after[n]) for n in before)
    trained = tensors(tmp_path / "trained")
    assert {n: t.shape for n, t in trained.items()} == {n: t.shape for n, t in before.items()}
    assert not all(trained[n].equal(before[n]) for n in before)


def test_a_folder_of_an_unknown_family_is_refused_in_one_line(tmp_path: Path) -> None:
    from llmscale.errors import RecipeError
    from llmscale.models.huggingface_config import read_architecture

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(
        RecipeError, match="model_type 'mamba' is not supported; give a folder of type llama"
    ):
        read_architecture(tmp_path)
