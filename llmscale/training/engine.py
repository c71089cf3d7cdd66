"""What an engine is: it owns a model, its optimizer and its parallelism."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from llmscale.training.batches import ModelBatch
from llmscale.training.settings import Optimizer


@dataclass(frozen=True)
class Totals:
    """A global batch, as every rank knows it.

    Attributes:
        loss: summed over ``count`` tokens or samples.
        figures: what else a batch tells, as means over the same number.
    """

    loss: float
    count: int
    figures: Mapping[str, float]

    @property
    def mean(self) -> float:
        """The loss a token or sample."""
        return self.loss / max(self.count, 1)

    @classmethod
    def of(cls, sums: Tensor, names: Sequence[str]) -> "Totals":
        """From one vector: loss, count, and the sums of the figures."""
        loss, count, *told = sums.tolist()
        means = (total / max(count, 1) for total in told)
        return cls(loss, int(count), dict(zip(names, means, strict=True)))


@dataclass(frozen=True)
class StepResult:
    """One step, as every rank knows it: its mean loss, over how many, gradient norm,
    and if it counted.

    ``overflowed``: the step was skipped because the fp16 loss scale was too high; it has been
    lowered, as dynamic loss scaling does (Micikevicius et al. 2018, section 3.2).
    """

    loss: float
    count: int
    gradient_norm: float
    applied: bool
    overflowed: bool = False
    figures: Mapping[str, float] = field(default_factory=dict)


class Writing(Protocol):
    """A copy of an engine's state on its way into a folder; made by all ranks."""

    def write(self) -> None:
        """Writes this rank's files; may be called in a thread."""

    def files(self) -> list[Path]:
        """What this rank has written."""

    def elsewhere(self) -> Mapping[str, str]:
        """Checksums of what other worlds' ranks have written, by names in the checkpoint."""
        return {}

    def finish(self) -> None:
        """Writes what the files have in common, after all are written; collective."""


class Stateful(Protocol):
    """What a checkpoint holds. Every method is collective."""

    def writing(self, folder: Path) -> Writing:
        """Takes a copy of the whole state, to be written into a folder that is there."""

    def load(self, folder: Path) -> None:
        """Restores the state and, at the same number of ranks, random states."""


class Engine(Stateful, Protocol):
    """Trains a model. Every method is collective unless it says otherwise."""

    @property
    def settings(self) -> Optimizer: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def data_rank(self) -> int:
        """Which copy of the model this rank is a part of; not collective."""

    @property
    def data_ranks(self) -> int:
        """How many copies there are; not collective."""

    @property
    def passes_multiple(self) -> int:
        """The number of micro-batches a rank has at a time is a multiple of this."""

    def train_step(self, batches: Sequence[ModelBatch], learning_rate: float) -> StepResult:
        """Forward, backward and, if loss and gradients are finite, the update.

        Args:
            batches: this data rank's micro-batches of the global batch.
        """

    def evaluate(self, batches: Sequence[ModelBatch]) -> Totals:
        """The loss of a global batch, and nothing learned from it."""

    def outputs(self, batches: Sequence[ModelBatch]) -> list[Tensor]:
        """What the model makes of each batch: losses or scores a token, ``[b, s, ...]``.

        Returns:
            none on ranks that are not of the last pipeline stage.
        """

    def flops_per_sample(self, sequence_length: int) -> float:
        """Model FLOP of training on one sample; not collective."""

    def parameters(self) -> int:
        """How many the whole model has; not collective."""

    def load_weights(self, folder: Path) -> None:
        """Restores the weights alone."""

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its Hugging Face name, whole, on every rank, in one order.

        An adapter is merged. A tensor may be gone with the next one.
        """

    def export(self, folder: Path) -> None:
        """Writes the weights and ``config.json`` of a Hugging Face folder."""
