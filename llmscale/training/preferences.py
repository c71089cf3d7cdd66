"""Preference training without a reward model: DPO, IPO and KTO.

Shape legend: b texts, s tokens a text, p pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from llmscale.data.chat import Example
from llmscale.data.groups import Group
from llmscale.training.batches import LossSum, ModelBatch, WholeTextBatch, no_figures
from llmscale.training.engine import Engine
from llmscale.training.preference_losses import (
    direct_preference,
    identity_preference,
    prospect_theory,
)
from llmscale.training.rows import RowForm

PairLoss = Literal["sigmoid", "ipo"]


@dataclass(frozen=True, kw_only=True)
class AnswerBatch(WholeTextBatch):
    """Texts with their answers, of which the model's probability is wanted.

    ``reference_b`` are the reference's log-probabilities; ``counts_b`` says which texts count.
    """

    labels_bs: Tensor
    mask_bs: Tensor
    counts_b: Tensor
    reference_b: Tensor

    figures: ClassVar[tuple[str, ...]] = ()

    @property
    def count(self) -> Tensor:
        return self.counts_b.sum().to(torch.int)

    def log_probabilities(self, losses_bs: Tensor) -> Tensor:
        """Those of the answers, ``[b]``."""
        return -torch.where(self.mask_bs > 0, losses_bs.float(), 0.0).sum(1)

    def log_ratios(self, losses_bs: Tensor) -> Tensor:
        """Of the model's probability to the reference's, ``[b]``."""
        return self.log_probabilities(losses_bs) - self.reference_b

    def loss(self, outputs: Tensor) -> LossSum:
        """The sum of the log ratios: an estimate of a KL divergence, not to be minimized."""
        return LossSum(self._sum(self.log_ratios(outputs)), self.count, no_figures(outputs))

    def counting(self, counts: Tensor) -> Self:
        rows = self.samples // len(counts)
        return replace(self, counts_b=self.counts_b * counts.repeat_interleave(rows))

    def _sum(self, values_b: Tensor) -> Tensor:
        return torch.where(self.counts_b > 0, values_b * self.counts_b, 0.0).sum()


@dataclass(frozen=True, kw_only=True)
class PairBatch(AnswerBatch):
    """Pairs of answers to one prompt: even rows are the chosen ones."""

    pair_loss: PairLoss
    beta: float

    figures: ClassVar[tuple[str, ...]] = ("accuracy", "chosen_reward", "rejected_reward")

    @property
    def count(self) -> Tensor:
        return self.counts_b[::2].sum().to(torch.int)

    def loss(self, outputs: Tensor) -> LossSum:
        ratio_b = self.log_ratios(outputs)
        if self.pair_loss == "ipo":
            mean_b = ratio_b / self.mask_bs.sum(1)
            losses_p = identity_preference(mean_b[::2], mean_b[1::2], self.beta)
        else:
            losses_p = direct_preference(ratio_b[::2], ratio_b[1::2], self.beta)
        reward_b = self.beta * ratio_b.detach()
        chosen_p, rejected_p = reward_b[::2], reward_b[1::2]
        told = [(chosen_p > rejected_p).double(), chosen_p, rejected_p]
        return LossSum(
            self._pair_sum(losses_p), self.count, torch.stack([self._pair_sum(t) for t in told])
        )

    def _pair_sum(self, values_p: Tensor) -> Tensor:
        counts_p = self.counts_b[::2]
        return torch.where(counts_p > 0, values_p * counts_p, 0.0).sum()


@dataclass(frozen=True, kw_only=True)
class JudgedBatch(AnswerBatch):
    """Answers that are wanted or not; ``others`` are other prompts' answers to the same prompts."""

    desirable_b: Tensor
    weight_b: Tensor
    others: AnswerBatch
    kl: Tensor
    beta: float

    figures: ClassVar[tuple[str, ...]] = ("accuracy", "kl")

    def loss(self, outputs: Tensor) -> LossSum:
        ratio_b = self.log_ratios(outputs)
        losses_b = prospect_theory(ratio_b, self.desirable_b, self.kl, self.beta)
        right_b = ((ratio_b.detach() > self.kl) == self.desirable_b).double()
        told = torch.stack([self._sum(right_b), self.count * self.kl])
        return LossSum(self._sum(losses_b * self.weight_b), self.count, told)

    def counting(self, counts: Tensor) -> Self:
        return replace(super().counting(counts), others=self.others.counting(counts))


@dataclass(frozen=True)
class Pairs:
    """Makes batches of pairs."""

    form: RowForm
    pair_loss: PairLoss
    beta: float

    def batch(self, samples: Sequence[Group], length: int, device: torch.device) -> PairBatch:
        """A batch of pairs, in rows of that length."""
        answers = _answers(self.form, samples, (0, 1), length, device)
        return PairBatch(**answers, pair_loss=self.pair_loss, beta=self.beta)


@dataclass(frozen=True)
class Judged:
    """Makes batches of answers that are wanted or not.

    A group's second text is its prompt with another group's answer.
    """

    form: RowForm
    beta: float
    desirable_weight: float
    undesirable_weight: float

    def batch(self, samples: Sequence[Group], length: int, device: torch.device) -> JudgedBatch:
        """A batch of answers, in rows of that length."""
        desirable_b = torch.tensor([group.target > 0 for group in samples], device=device)
        return JudgedBatch(
            **_answers(self.form, samples, (0,), length, device),
            desirable_b=desirable_b,
            weight_b=torch.where(desirable_b, self.desirable_weight, self.undesirable_weight),
            others=AnswerBatch(**_answers(self.form, samples, (1,), length, device)),
            kl=torch.zeros((), device=device),
            beta=self.beta,
        )


def answer_batch(
    form: RowForm, texts: Sequence[Example], length: int, device: torch.device
) -> AnswerBatch:
    """Texts whose answers' probabilities are wanted, in rows of that length."""
    return AnswerBatch(**_rows(form, texts, [0.0] * len(texts), length, device))


def _answers(
    form: RowForm,
    samples: Sequence[Group],
    chosen: tuple[int, ...],
    length: int,
    device: torch.device,
) -> dict[str, Any]:
    """Some texts of each group as rows; a reference that is not known yet is 0."""
    texts = [group.texts[n] for group in samples for n in chosen]
    known = [group.references[n] if group.references else 0.0 for group in samples for n in chosen]
    return _rows(form, texts, known, length, device)


def _rows(
    form: RowForm,
    texts: Sequence[Example],
    known: Sequence[float],
    length: int,
    device: torch.device,
) -> dict[str, Any]:
    rows = form.rows([[text] for text in texts], length, device)
    return {
        "tokens_bs": rows.tokens_bs,
        "positions_bs": rows.positions_bs,
        "labels_bs": rows.labels_bs,
        "mask_bs": rows.mask_bs,
        "counts_b": torch.ones(len(known), device=device),
        "reference_b": torch.tensor(known, dtype=torch.float32, device=device),
    }


@dataclass(frozen=True)
class Completed:
    """Adds to a global batch of answers what their loss needs of a model before.

    Args:
        reference: what gives the reference's probabilities where they are not kept.
    """

    reference: Engine | None

    def __call__(self, engine: Engine, batches: Sequence[ModelBatch]) -> Sequence[ModelBatch]:
        answers = [batch for batch in batches if isinstance(batch, AnswerBatch)]
        answers = self._with_reference(answers)
        judged = [batch for batch in answers if isinstance(batch, JudgedBatch)]
        if not judged:
            return answers
        others = self._with_reference([batch.others for batch in judged])
        kl = max(0.0, engine.evaluate(others).mean)
        return [replace(batch, kl=torch.full_like(batch.kl, kl)) for batch in judged]

    def _with_reference(self, answers: Sequence[AnswerBatch]) -> list[AnswerBatch]:
        if self.reference is None:
            return list(answers)
        outputs = self.reference.outputs(answers)
        if not outputs:
            return list(answers)  # of a pipeline's earlier stages, which make no loss
        return [
            replace(batch, reference_b=batch.log_probabilities(losses_bs))
            for batch, losses_bs in zip(answers, outputs, strict=True)
        ]
