"""Reward models: scores of texts, learned from comparisons or from scores.

A text's score is that at its last real token. Shape legend: b rows, s tokens a row, t texts,
k heads, g groups of texts, p pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from llmscale.data.chat import Example
from llmscale.data.groups import Group
from llmscale.data.packing import evenly_packed
from llmscale.training.batches import LossSum, WholeTextBatch, no_figures
from llmscale.training.preference_losses import bradley_terry, centering
from llmscale.training.rows import RowForm


@dataclass(frozen=True, kw_only=True)
class ScoredBatch(WholeTextBatch):
    """Texts that a model is to score: the row and the place in it where each ends.

    ``counts_g`` says which groups count.
    """

    row_t: Tensor
    last_t: Tensor
    counts_g: Tensor

    labels_bs: ClassVar[None] = None

    @property
    def count(self) -> Tensor:
        return self.counts_g.sum().to(torch.int)

    def scores(self, scores_bsk: Tensor) -> Tensor:
        """The scores of whole texts, ``[t, k]``."""
        return scores_bsk.float()[self.row_t, self.last_t]

    def counting(self, counts: Tensor) -> Self:
        return replace(self, counts_g=self.counts_g * counts)


@dataclass(frozen=True, kw_only=True)
class ComparisonBatch(ScoredBatch):
    """Pairs of texts: the better one's number and the worse one's.

    Of a ranking all pairs are compared, and count as one (Ouyang et al. 2022, equation 1).
    """

    better_p: Tensor
    worse_p: Tensor
    margin_p: Tensor
    head_p: Tensor
    group_p: Tensor
    share_p: Tensor
    centering: float

    figures: ClassVar[tuple[str, ...]] = ("accuracy", "score_difference")

    def loss(self, outputs: Tensor) -> LossSum:
        scores_tk = self.scores(outputs)
        better_p = scores_tk[self.better_p, self.head_p]
        worse_p = scores_tk[self.worse_p, self.head_p]
        losses_p = bradley_terry(better_p, worse_p, self.margin_p)
        if self.centering:
            losses_p = losses_p + self.centering * centering(better_p, worse_p)
        difference_p = (better_p - worse_p).detach()
        told = torch.stack([self._sum((difference_p > 0).double()), self._sum(difference_p)])
        return LossSum(self._sum(losses_p), self.count, told)

    def _sum(self, values_p: Tensor) -> Tensor:
        weight_p = self.share_p * self.counts_g[self.group_p]
        return torch.where(weight_p > 0, values_p * weight_p, 0.0).sum()


@dataclass(frozen=True, kw_only=True)
class RegressionBatch(ScoredBatch):
    """Texts, and the score each is to have."""

    target_g: Tensor
    head_g: Tensor

    figures: ClassVar[tuple[str, ...]] = ()

    def loss(self, outputs: Tensor) -> LossSum:
        scores_g = self.scores(outputs).gather(1, self.head_g[:, None])[:, 0]
        squares_g = (scores_g - self.target_g).square()
        total = torch.where(self.counts_g > 0, squares_g * self.counts_g, 0.0).sum()
        return LossSum(total, self.count, no_figures(outputs))


@dataclass(frozen=True)
class Comparisons:
    """Makes batches of groups whose texts are compared.

    Args:
        texts: of the largest group; every group has so many, some of them empty.
        centering: how much scores are drawn to a mean of 0.
    """

    form: RowForm
    texts: int
    centering: float

    def batch(self, samples: Sequence[Group], length: int, device: torch.device) -> ComparisonBatch:
        """A batch of groups, in rows of that length."""
        texts: list[list[Example]] = []
        pairs: list[tuple[int, int, float, int, int, float]] = []
        for number, group in enumerate(samples):
            own = list(combinations(range(len(texts), len(texts) + len(group.texts)), 2))
            share = 1 / len(own)
            pairs += [(i, j, group.margin, group.head, number, share) for i, j in own]
            texts += [[text] for text in group.texts]
            texts += [[]] * (self.texts - len(group.texts))
        better, worse, margin, head, group_of, shares = zip(*pairs, strict=True)
        return ComparisonBatch(
            **_rows(self.form, texts, length, device),
            counts_g=torch.ones(len(samples), device=device),
            better_p=torch.tensor(better, device=device),
            worse_p=torch.tensor(worse, device=device),
            margin_p=torch.tensor(margin, dtype=torch.float32, device=device),
            head_p=torch.tensor(head, device=device),
            group_p=torch.tensor(group_of, device=device),
            share_p=torch.tensor(shares, dtype=torch.float32, device=device),
            centering=self.centering,
        )


@dataclass(frozen=True)
class Regression:
    """Makes batches of single texts with the scores they are to have.

    Args:
        mean, spread: of the scores as people gave them; the model learns them without.
    """

    form: RowForm
    mean: Sequence[float]
    spread: Sequence[float]

    def batch(self, samples: Sequence[Group], length: int, device: torch.device) -> RegressionBatch:
        """A batch of texts, in rows of that length."""
        targets = [
            (group.target - self.mean[group.head]) / self.spread[group.head] for group in samples
        ]
        return RegressionBatch(
            **_rows(self.form, [[group.texts[0]] for group in samples], length, device),
            counts_g=torch.ones(len(samples), device=device),
            target_g=torch.tensor(targets, dtype=torch.float32, device=device),
            head_g=torch.tensor([group.head for group in samples], device=device),
        )


def _rows(
    form: RowForm, texts: Sequence[Sequence[Example]], length: int, device: torch.device
) -> dict[str, Any]:
    """Texts as rows, and where each ends; one that a group does not have is of padding alone."""
    lengths = [sum(map(len, text)) for text in texts]
    sharing = [[number] for number in range(len(texts))]
    if form.shared:
        sharing = evenly_packed(lengths, form.room)
        length = form.length(max(sum(lengths[number] for number in row) for row in sharing))
    rows = form.rows([[one for n in row for one in texts[n]] for row in sharing], length, device)
    ends = {
        number: (row, max(0, end - 1))
        for row, numbers in enumerate(sharing)
        for number, end in zip(numbers, accumulate(lengths[n] for n in numbers), strict=True)
    }
    row_t, last_t = torch.tensor([ends[number] for number in range(len(texts))], device=device).T
    return {
        "tokens_bs": rows.tokens_bs,
        "positions_bs": rows.positions_bs,
        "segments_bs": rows.segments_bs if form.shared else None,
        "row_t": row_t,
        "last_t": last_t,
    }
