"""What no model is to learn from changes no gradient: padding, prompts as labels, other texts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from llmscale.data.chat import Example
from llmscale.data.groups import Group
from llmscale.training.batches import ModelBatch
from llmscale.training.preferences import Pairs
from llmscale.training.rewards import Comparisons, Regression
from llmscale.training.rows import RowForm
from llmscale.training.supervised import Supervised
from tests.models_on_disk import small_llama

ROOM, CPU = 40, torch.device("cpu")
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("masking") / "base")


def text(lot: np.random.Generator) -> Example:
    tokens_n = lot.integers(10, 200, lot.integers(4, 16)).astype(np.int32)
    return Example(tokens_n, np.arange(len(tokens_n)) >= 3)


def groups(many: int = 6) -> list[Group]:
    lot = np.random.default_rng(5)
    return [
        Group((text(lot), text(lot)), margin=0.1 * number, target=number % 3)
        for number in range(many)
    ]


def supervised(form: RowForm) -> ModelBatch:
    lot = np.random.default_rng(6)
    packed = [[text(lot), text(lot)] for _ in range(4)]
    return Supervised(form, several=True).batch(packed, ROOM, CPU)


def direct(form: RowForm) -> ModelBatch:
    return Pairs(form, "sigmoid", beta=0.3).batch(groups(), ROOM, CPU)


def compared(form: RowForm) -> ModelBatch:
    return Comparisons(form, texts=2, centering=0.05).batch(groups(), ROOM, CPU)


def rated(form: RowForm) -> ModelBatch:
    return Regression(form, mean=[0.5], spread=[2.0]).batch(groups(), ROOM, CPU)


BATCHES: dict[str, Callable[[RowForm], ModelBatch]] = {
    "supervised": supervised,
    "direct preference": direct,
    "compared": compared,
    "rated": rated,
}
SCORED = ("compared", "rated")


def learned(base: Path, batch: Any) -> tuple[float, Gradients]:
    """The loss, and the gradient of each parameter."""
    inputs = batch.model_inputs()
    if (segments_bs := inputs["attention_mask"]) is not None:
        same_bss = segments_bs[:, :, None] == segments_bs[:, None, :]
        inputs["attention_mask"] = same_bss.tril()[:, None]
    if batch.labels_bs is None:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        outputs = model.score(model.model(**inputs).last_hidden_state)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
        logits_bsv, labels_bs = model(**inputs).logits, batch.labels_bs
        losses = cross_entropy(logits_bsv.flatten(0, 1), labels_bs.flatten(), reduction="none")
        outputs = losses.view_as(labels_bs)
    total = batch.loss(outputs).total
    total.backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert any(gradient.abs().max() > 0 for gradient in found.values())
    return total.item(), found


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", BATCHES)
def test_padding_changes_no_gradient(kind: str, shared: bool, base: Path) -> None:
    loss, gradients = learned(base, BATCHES[kind](RowForm(1, ROOM, 8, shared)))
    other_loss, others = learned(base, BATCHES[kind](RowForm(7, ROOM, 8, shared)))
    assert loss == other_loss
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name


@pytest.mark.parametrize("kind", ["supervised", "direct preference"])
def test_a_prompt_is_no_label(kind: str, base: Path) -> None:
    batch: Any = BATCHES[kind](RowForm(1, ROOM, 8))
    loss, gradients = learned(base, batch)
    unlearned = torch.where(batch.mask_bs > 0, batch.labels_bs, 9)
    assert not torch.equal(unlearned, batch.labels_bs)
    other_loss, others = learned(base, replace(batch, labels_bs=unlearned))
    assert loss == other_loss
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name


@pytest.mark.parametrize("kind", SCORED)
def test_texts_that_share_a_row_are_scored_as_if_alone(kind: str, base: Path) -> None:
    alone, shared = (BATCHES[kind](RowForm(1, ROOM, 8, shared)) for shared in (False, True))
    assert shared.samples * shared.length < alone.samples * alone.length / 1.5
    loss, gradients = learned(base, alone)
    other_loss, others = learned(base, shared)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
