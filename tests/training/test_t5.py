"""T5 trains alike at every layout, on spans taken out of texts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.data.span_lengths import span_lengths
from tests.conftest import QUICKSTART
from tests.models.test_huggingface import tensors
from tests.ranks import layout_ranks, run_ranks, run_recipe
from tests.training import programs
from tests.training.test_layouts import curve

TEXTS = QUICKSTART.parent / "texts" / "shakespeare"
MODEL: dict[str, Any] = {
    "family": "t5",
    "layers": 3,
    "decoder_layers": 5,
    "hidden_size": 32,
    "attention_heads": 4,
    "ffn_size": 48,
    "sequence_length": 32,
    "relative_buckets": 8,
    "relative_distance": 12,
}
FIRST_VERSION = {**MODEL, "gated": False, "tied_embeddings": True}


def train(folder: Path, case: dict[str, Any], **more: Any) -> list[list[float]]:
    """Three steps; returns each step's loss and gradient norm, and leaves the model in out."""
    given: dict[str, Any] = {
        "steps": 3,
        "checkpoints": str(folder / "checkpoints"),
        "exported": str(folder / "out"),
        **case,
        **more,
    }
    results: list[list[float]] = run_ranks(
        programs.t5_steps, layout_ranks(case["layout"]), folder / "run", **given
    )
    return results


def assert_equal(
    ours: list[list[float]], expected: list[list[float]], folder: Path, one: Path
) -> None:
    for (loss, norm), (expected_loss, expected_norm) in zip(ours, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
    there, here = tensors(one / "out"), tensors(folder / "out")
    assert there.keys() == here.keys()
    worst = {n: float((there[n] - here[n]).abs().max()) for n in there}
    assert max(worst.values()) <= 1e-5, sorted(worst.items(), key=lambda kv: -kv[1])[:3]


@pytest.mark.ranks
@pytest.mark.parametrize("distributed", [False, True])
def test_a_checkpoint_of_one_layout_goes_on_at_another(distributed: bool, tmp_path: Path) -> None:
    one, common = tmp_path / "one", {"model": FIRST_VERSION, "distributed": distributed}
    expected = train(one, {"layout": {}}, **common)
    common["checkpoints"] = str(tmp_path / "checkpoints")
    uneven = {"layout": {"pipeline": 2, "layers_per_stage": [2, 6], "data": 2}}
    first = train(tmp_path / "first", uneven, steps=2, save=2, **common)
    other = {"layout": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}}
    then = train(tmp_path / "then", other, start=2, **common)
    assert_equal([*first, *then], expected, tmp_path / "then", one)


@given(length=st.integers(8, 400), seed=st.integers(0, 2**32), place=st.integers(0, 2**40))
@settings(deadline=None, max_examples=50)
def test_input_and_target_together_give_back_the_text(length: int, seed: int, place: int) -> None:
    from llmscale.training.objectives import Spans

    lengths, end, padding = span_lengths(length), 1000, 1001
    sentinels = tuple(range(2000, 2000 + lengths.spans))
    objective = Spans(length, sentinels, padding, end, seed)
    assert objective.sample_length(length) == lengths.text
    text = np.random.default_rng(0).integers(0, 1000, lengths.text + 1)

    def batch(places: list[int]) -> Any:
        return objective.batch(np.stack([text] * len(places)), places, torch.device("cpu"))

    alone, last = batch([place]), batch([0, place])
    inputs, target = alone.inputs_bs[0].tolist(), alone.labels_bs[0].tolist()
    assert last.inputs_bs[1].tolist() == inputs
    assert last.labels_bs[1].tolist() == target
    assert len(inputs) == length
    assert len(target) == lengths.target
    assert alone.decoder_inputs_bt[0].tolist() == [padding, *target[:-1]]
    assert inputs.pop() == target.pop() == end
    pieces: dict[int, list[int]] = {}
    for token in target:
        if token in sentinels:
            pieces[token] = []
        else:
            pieces[list(pieces)[-1]].append(token)
    assert tuple(pieces) == sentinels
    assert all(pieces.values())
    assert [t for i in inputs for t in pieces.get(i, [i])] == text[: lengths.text].tolist()


def test_15_percent_of_a_text_are_taken_out_in_spans_of_3() -> None:
    for length in (64, 512, 2048):
        lengths = span_lengths(length)
        assert lengths.noise / lengths.text == pytest.approx(0.15, abs=0.01)
        assert lengths.noise / lengths.spans == pytest.approx(3, abs=0.3)


@pytest.mark.ranks
def test_a_recipe_trains_t5_from_text_to_a_folder(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    recipe: dict[str, Any] = {
        "name": "t5",
        "cluster": {"ranks_per_node": 2},
        "stages": {
            "corpus": {"kind": "prepare", "sources": [{"path": f"{TEXTS}/*.txt"}]},
            "tokenizer": {
                "kind": "tokenizer",
                "corpus": "corpus",
                "vocabulary_size": 512,
                "sentinels": 10,
            },
            "pretrain": {
                "kind": "pretrain",
                "corpus": "corpus",
                "tokenizer": "tokenizer",
                "model": MODEL,
                "parallel": {"pipeline": 2},
                "batch": {"global": 16, "micro": 8},
                "optimizer": {"learning_rate": 1e-2, "warmup_steps": 5},
                "steps": 30,
                "checkpoint": {"every": 30},
                "validation": {"samples": 16},
            },
        },
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    folder = run_recipe(tmp_path / "recipe.yaml", tmp_path / "run", []).path / "pretrain"
    losses = curve(folder, "loss")
    assert losses[-1] < losses[0] - 0.5
    model = T5ForConditionalGeneration.from_pretrained(folder / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    assert model.config.decoder_start_token_id == tokenizer.pad_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id
