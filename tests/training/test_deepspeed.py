"""Pretraining by DeepSpeed begins and goes as by Megatron, for every objective."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmscale.artifacts import RunFolder, read_json
from llmscale.models.huggingface_config import read_architecture
from llmscale.training.deepspeed_model import loaded_model
from llmscale.training.settings import Zero
from tests.conftest import QUICKSTART
from tests.models_on_disk import small_llama
from tests.ranks import run_recipe

RECIPE = f"""
name: two-engines
cluster: {{on: local, ranks_per_node: 1, device: cpu}}
stages:
  corpus:
    kind: prepare
    sources: [{{path: "{QUICKSTART.parent}/texts/shakespeare/m*.txt"}}]
    validation_fraction: 0.2
  tokenizer:
    kind: tokenizer
    corpus: corpus
    vocabulary_size: 400
    mask_token: true
    sentinels: 8
  pretrain:
    kind: pretrain
    corpus: corpus
    tokenizer: tokenizer
    model: {{family: llama, layers: 2, hidden_size: 32, attention_heads: 4, sequence_length: 32}}
    batch: {{global: 8, micro: 2}}
    optimizer: {{learning_rate: 3.0e-3, warmup_steps: 1}}
    steps: 4
"""
FAMILIES = {
    "llama": ["stages.pretrain.separate_documents=true"],
    "bert": ["stages.pretrain.model.family=bert"],
    "t5": ["stages.pretrain.model.family=t5"],
}


def curve(folder: Path, engine: str, *overrides: str) -> list[tuple[float, float]]:
    (folder / "recipe.yaml").write_text(RECIPE)
    run = RunFolder(folder / engine)
    overrides = (*overrides, f"stages.pretrain.engine={engine}")
    run_recipe(folder / "recipe.yaml", run.path, list(overrides))
    lines = run.stage("pretrain").metrics()
    return [(line["loss"], line["gradient_norm"]) for line in lines if "loss" in line]


@pytest.mark.ranks
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_megatron_engine_s_curve(family: str, tmp_path: Path) -> None:
    expected = curve(tmp_path, "megatron", *FAMILIES[family])
    two_ranks = ["cluster.ranks_per_node=2", "stages.pretrain.zero={stage: 3}"]
    found = curve(tmp_path, "deepspeed", *FAMILIES[family], *two_ranks)
    assert len(found) == len(expected) == 4
    for (loss, norm), (true_loss, true_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(true_loss, rel=1e-5)
        assert norm == pytest.approx(true_norm, rel=1e-4)


def test_a_padding_token_that_ends_texts_learns_as_other_tokens_do(tmp_path: Path) -> None:
    folder = small_llama(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(folder, pad_token_id=None)
    padding = read_json(folder / "config.json")["pad_token_id"]
    tokens_bs = torch.tensor([[20, 30, padding, 40], [50, padding, padding, 60]])
    loaded = loaded_model(folder, read_architecture(folder), None, Zero(), "none", "cpu")
    for model in (plain, loaded):
        model(input_ids=tokens_bs, labels=tokens_bs).loss.backward()
    expected, found = (model.get_input_embeddings().weight.grad for model in (plain, loaded))
    assert expected[padding].abs().max() > 0
    torch.testing.assert_close(found, expected)
