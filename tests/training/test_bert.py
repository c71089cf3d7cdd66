"""BERT: which tokens are to be guessed, that layouts agree, and a recipe from end to end."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from llmscale.data.tokenizer import train_tokenizer
from llmscale.errors import RecipeError, StageError
from llmscale.evaluation.models import load_model
from llmscale.models.stored_weights import HuggingFaceWeights
from llmscale.training.batches import TokenBatch
from llmscale.training.objectives import Masked
from tests.models.test_huggingface import tensors
from tests.ranks import run_recipe
from tests.training.test_layouts import curve

CPU = torch.device("cpu")
VOCABULARY, MASK, SPECIAL = 1000, 3, (0, 1, 2, 3)

RECIPE = """
name: masked
cluster: {on: local, nodes: 1, ranks_per_node: 4, device: cpu}
stages:
  corpus: {kind: prepare, sources: [{path: "*.txt"}], validation_fraction: 0.2}
  tokenizer: {kind: tokenizer, corpus: corpus, vocabulary_size: 300, mask_token: true}
  pretrain:
    kind: pretrain
    corpus: corpus
    tokenizer: tokenizer
    model: {family: bert, layers: 2, hidden_size: 32, attention_heads: 4, sequence_length: 32}
    parallel: {tensor: 2, pipeline: 2, sequence: true}
    batch: {global: 16, micro: 4}
    optimizer: {name: adamw, learning_rate: 5.0e-3, schedule: constant, warmup_steps: 5}
    steps: 30
    checkpoint: {every: 15}
"""


def masked(windows: np.ndarray, places: list[int], seed: int = 7) -> TokenBatch:
    return Masked(seed, VOCABULARY, MASK, SPECIAL).batch(windows, places, CPU)


def test_of_fifteen_percent_most_are_masked_some_changed_and_some_kept() -> None:
    windows = np.random.default_rng(1).integers(4, VOCABULARY, (1000, 201))
    batch = masked(windows, list(range(1000)))
    chosen = batch.mask_bs.bool()
    assert chosen.sum(1).eq(30).all()
    assert batch.tokens_bs[~chosen].equal(batch.labels_bs[~chosen])
    assert batch.labels_bs.equal(torch.from_numpy(windows[:, :-1]))
    guessed, shown = batch.labels_bs[chosen], batch.tokens_bs[chosen]
    kept, hidden = shown == guessed, shown == MASK
    assert hidden.float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert kept.float().mean().item() == pytest.approx(0.1, abs=0.01)
    changed = shown[~kept & ~hidden]
    assert len(changed) / len(shown) == pytest.approx(0.1, abs=0.01)
    assert changed.min() >= len(SPECIAL)
    assert changed.float().mean().item() == pytest.approx(VOCABULARY / 2, rel=0.05)
    assert chosen.float().mean(0).std() < 0.02  # no place in a sample is preferred


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    places=st.lists(st.integers(0, 10**12), min_size=1, max_size=6),
    text=st.integers(0, 2**32),
    length=st.integers(1, 60),
)
def test_what_is_masked_depends_on_the_seed_and_the_place_alone(
    seed: int, places: list[int], text: int, length: int
) -> None:
    windows = np.random.default_rng(text).integers(0, 40, (len(places), length + 1))
    together = masked(windows, places, seed)
    special = torch.from_numpy(np.isin(windows[:, :-1], SPECIAL))
    assert not together.mask_bs[special].any()
    assert together.mask_bs.sum(1).bool().equal(~special.all(1))
    for row, place in enumerate(places):
        alone = masked(windows[row : row + 1], [place], seed)
        assert alone.tokens_bs.equal(together.tokens_bs[row : row + 1])
        assert alone.mask_bs.equal(together.mask_bs[row : row + 1])


def test_another_seed_or_place_masks_other_tokens() -> None:
    windows = np.random.default_rng(1).integers(4, VOCABULARY, (1, 201))
    masks = [masked(windows, [place], seed).mask_bs for seed, place in ((7, 0), (7, 1), (8, 0))]
    assert not any(masks[a].equal(masks[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def write_texts(folder: Path) -> None:
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"{number}: fair is foul, and foul is fair. " * 30)


@pytest.mark.ranks
def test_a_recipe_from_text_to_a_model_that_guesses_masked_tokens(tmp_path: Path) -> None:
    write_texts(tmp_path)
    recipe = tmp_path / "masked.yaml"
    recipe.write_text(RECIPE)
    run = run_recipe(recipe, tmp_path / "run", [])
    stage = run.stage("pretrain")
    losses = curve(stage.path, "loss")
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]
    model, found = AutoModelForMaskedLM.from_pretrained(stage.hf, output_loading_info=True)
    assert not any(found.values()), found
    assert stage.manifest()["metrics"]["parameters"] == model.num_parameters()
    assert AutoTokenizer.from_pretrained(stage.hf).mask_token_id is not None
    command = [sys.executable, "-m", "llmscale", "export", f"{run.path}:pretrain"]
    subprocess.run([*command, "--out", str(tmp_path / "again")], check=True)
    whole, again = tensors(stage.hf), tensors(tmp_path / "again")
    assert whole.keys() == again.keys()
    assert all(whole[name].equal(again[name]) for name in whole)
    with pytest.raises(RecipeError, match="bert does not go on from a text"):
        load_model(stage.hf)


@pytest.mark.ranks
def test_a_folder_whose_tokenizer_has_no_mask_token_is_refused(tmp_path: Path) -> None:
    write_texts(tmp_path)
    train_tokenizer(iter(["thunder"]), "bpe", 300).save_pretrained(tmp_path / "plain")
    recipe = tmp_path / "masked.yaml"
    recipe.write_text(RECIPE.replace("tokenizer: tokenizer", "tokenizer: plain"))
    with pytest.raises(
        StageError, match="plain: the tokenizer has no mask token, which bert needs"
    ):
        run_recipe(recipe, tmp_path / "run", [], ["corpus", "pretrain"])


@pytest.mark.ranks
def test_a_folder_whose_tokenizer_has_no_end_of_text_is_refused(tmp_path: Path) -> None:
    write_texts(tmp_path)
    tokenizer = train_tokenizer(iter(["thunder"]), "bpe", 300, mask_token=True)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "plain")
    recipe = tmp_path / "masked.yaml"
    recipe.write_text(RECIPE.replace("tokenizer: tokenizer", "tokenizer: plain"))
    with pytest.raises(StageError, match="plain: the tokenizer has no end-of-text token"):
        run_recipe(recipe, tmp_path / "run", [], ["corpus", "pretrain"])


def test_norms_of_the_first_folders_are_found_by_their_names_today(tmp_path: Path) -> None:
    names = {f"bert.embeddings.LayerNorm.{end}": torch.ones(2) for end in ("gamma", "beta")}
    save_file(names, tmp_path / "model.safetensors")
    weights = HuggingFaceWeights(tmp_path)
    assert weights["bert.embeddings.LayerNorm.weight"].equal(torch.ones(2))
    assert weights["bert.embeddings.LayerNorm.bias"].equal(torch.ones(2))
