"""Losses and gradients are TRL's, on the same weights and batch."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

from llmscale.data.chat import Example
from llmscale.data.groups import Group
from llmscale.training.batches import ModelBatch
from llmscale.training.preferences import Judged, JudgedBatch, Pairs
from llmscale.training.rewards import Comparisons
from llmscale.training.rows import RowForm
from tests.models_on_disk import small_llama

LENGTH, PADDING, BETA = 24, 1, 0.3
CPU = torch.device("cpu")
FORM = RowForm(padding=PADDING, room=LENGTH, multiple=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("trl") / "base")


def text(lot: np.random.Generator, prompt: np.ndarray) -> Example:
    answer = lot.integers(10, 200, lot.integers(2, 12)).astype(np.int32)
    tokens_n = np.concatenate([prompt, answer])
    return Example(tokens_n, np.arange(len(tokens_n)) >= len(prompt))


def groups() -> list[Group]:
    lot, made = np.random.default_rng(5), []
    for number in range(6):
        prompt = lot.integers(10, 200, 4).astype(np.int32)
        texts = text(lot, prompt), text(lot, prompt)
        references = tuple(lot.uniform((-40, -90), (-10, -60)).tolist())
        made.append(Group(texts, margin=number / 4, target=number % 2, references=references))
    return made


def arguments(**more: Any) -> dict[str, Any]:
    """Of every trainer."""
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
    return {"per_device_train_batch_size": 6, **quiet, **more}


def theirs(texts: list[Example]) -> dict[str, torch.Tensor]:
    """A batch as TRL has it: padded on the right."""
    rows = FORM.rows([[one] for one in texts], LENGTH, CPU)
    lengths_b1 = torch.tensor([[len(one)] for one in texts])
    said_bs = torch.zeros_like(rows.tokens_bs)
    said_bs[:, 1:] = rows.mask_bs[:, :-1].long()
    seen_bs = (torch.arange(LENGTH) < lengths_b1).long()
    return {"input_ids": rows.tokens_bs, "attention_mask": seen_bs, "completion_mask": said_bs}


def assert_same(
    ours: torch.nn.Module,
    model: torch.nn.Module,
    batch: ModelBatch,
    outputs: Callable[[torch.nn.Module, ModelBatch], torch.Tensor],
    their_loss: Callable[[torch.nn.Module], torch.Tensor],
) -> None:
    """Loss and all gradients of a model, and of its copy that TRL has changed."""
    found = batch.loss(outputs(ours, batch))
    loss = found.total / found.count
    loss.backward()
    expected = their_loss(model)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient, found_gradient = wanted[name].grad, parameter.grad
        assert gradient is not None and found_gradient is not None, name
        apart = (gradient - found_gradient).abs().max() / gradient.abs().max()
        assert apart < 1e-5, name


def losses_of(model: Any, batch: Any) -> torch.Tensor:
    logits_bsv = model(input_ids=batch.tokens_bs, position_ids=batch.positions_bs).logits
    flat = cross_entropy(logits_bsv.flatten(0, 1), batch.labels_bs.flatten(), reduction="none")
    return flat.view_as(batch.labels_bs)


def scores_of(model: Any, batch: Any) -> torch.Tensor:
    return model.score(model.model(input_ids=batch.tokens_bs).last_hidden_state)


def test_the_reward_loss_with_margin_and_centering(base: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = PADDING
    ours = copy.deepcopy(model)
    config = RewardConfig(output_dir=str(tmp_path), center_rewards_coefficient=0.05, **arguments())
    made = groups()
    trainer = RewardTrainer(
        model,
        config,
        train_dataset=Dataset.from_list([{"chosen_ids": [5, 6], "rejected_ids": [5, 7]}]),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    inputs = theirs([one.texts[number] for number in (0, 1) for one in made])
    del inputs["completion_mask"]
    inputs["margin"] = torch.tensor([one.margin for one in made])
    batch = Comparisons(FORM, texts=2, centering=0.05).batch(made, LENGTH, CPU)
    assert_same(ours, model, batch, scores_of, lambda own: trainer.compute_loss(own, dict(inputs)))


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_the_preference_losses(loss: Any, base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    ours = copy.deepcopy(model)
    config = DPOConfig(
        output_dir=str(tmp_path),
        loss_type=[loss],
        beta=BETA,
        precompute_ref_log_probs=True,
        **arguments(),
    )
    made = groups()
    trainer = DPOTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 6),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    inputs = theirs([one.texts[number] for number in (0, 1) for one in made])
    for number, name in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
        inputs[name] = torch.tensor([one.references[number] for one in made])
    batch = Pairs(FORM, loss, BETA).batch(made, LENGTH, CPU)
    assert_same(ours, model, batch, losses_of, lambda own: trainer.compute_loss(own, dict(inputs)))


def test_the_loss_of_single_answers(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    ours = copy.deepcopy(model)
    config = KTOConfig(
        output_dir=str(tmp_path),
        beta=BETA,
        desirable_weight=1.5,
        precompute_ref_log_probs=True,
        train_sampling_strategy="sequential",
        **arguments(),
    )
    made = groups()
    trainer = KTOTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_list(
            [{"prompt": "a", "completion": "b", "label": bool(n % 2)} for n in range(6)]
        ),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    inputs: dict[str, Any] = theirs([one.texts[0] for one in made])
    inputs |= {f"KL_{key}": own for key, own in theirs([one.texts[1] for one in made]).items()}
    inputs["label"] = torch.tensor([bool(one.target) for one in made])
    inputs["ref_logps"] = torch.tensor([one.references[0] for one in made])
    inputs["ref_KL_logps"] = torch.tensor([one.references[1] for one in made])
    batch = Judged(FORM, BETA, 1.5, 1.0).batch(made, LENGTH, CPU)
    batch = with_reference_point(batch, ours)
    assert batch.kl > 0
    assert_same(ours, model, batch, losses_of, lambda own: trainer.compute_loss(own, dict(inputs)))


def with_reference_point(batch: JudgedBatch, model: Any) -> JudgedBatch:
    from dataclasses import replace

    with torch.no_grad():
        others = batch.others.loss(losses_of(model, batch.others))
    return replace(batch, kl=(others.total / others.count).clamp(min=0))
