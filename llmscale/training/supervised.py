"""Supervised fine-tuning: the next token, where an assistant says it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmscale.data.chat import Example
from llmscale.training.batches import TokenBatch
from llmscale.training.rows import RowForm


@dataclass(frozen=True)
class Supervised:
    """Makes batches of samples that each hold some examples.

    Loss is taken on learned tokens alone. Examples in one sample do not see each other, and
    positions begin anew in each.

    Args:
        several: whether samples hold several examples.
    """

    form: RowForm
    several: bool

    def batch(
        self, samples: Sequence[Sequence[Example]], length: int, device: torch.device
    ) -> TokenBatch:
        """A batch of samples, each filled up to that length."""
        rows = self.form.rows(samples, length, device)
        return TokenBatch(
            tokens_bs=rows.tokens_bs,
            labels_bs=rows.labels_bs,
            mask_bs=rows.mask_bs,
            positions_bs=rows.positions_bs,
            segments_bs=rows.segments_bs if self.several else None,
        )
