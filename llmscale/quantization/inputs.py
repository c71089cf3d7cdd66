"""What is kept of a layer's inputs over the calibration.

Shape legend: n tokens, i inputs (columns).
"""

import torch
from torch import Tensor

from llmscale.parallel import shares

PANELS = 6
SAMPLES_A_WINDOW = 16


class InputStatistics:
    """Of all tokens that reach a layer: the sum of X^T X, greatest magnitudes a column, samples.

    Args:
        with_products: whether the sum of X^T X, the Hessian, is wanted.
        with_magnitudes: whether the greatest magnitudes and samples are.
    """

    def __init__(self, columns: int, with_products: bool, with_magnitudes: bool) -> None:
        self.tokens = 0
        self._with_magnitudes = with_magnitudes
        self.largest_i = torch.zeros(columns)
        self._samples: list[Tensor] = []
        self._lower_ii = torch.zeros(columns, columns) if with_products else None

    def add(self, inputs: Tensor) -> None:
        """Takes in more tokens: all dimensions but the last."""
        inputs_ni = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += len(inputs_ni)
        if self._with_magnitudes:
            least, most = inputs_ni.aminmax(dim=0)
            self.largest_i = torch.maximum(self.largest_i, torch.maximum(most, -least))
            self._samples.append(inputs_ni[:: max(1, len(inputs_ni) // SAMPLES_A_WINDOW)].clone())
        if self._lower_ii is not None:
            add_products(self._lower_ii, inputs_ni)

    def join(self) -> None:
        """Takes in what the other ranks have; collective."""
        self.tokens = int(shares.added(torch.tensor(self.tokens)))
        shares.greatest(self.largest_i)
        self._samples = shares.in_order(self._samples)
        if self._lower_ii is not None:
            shares.added(self._lower_ii)

    @property
    def hessian_ii(self) -> Tensor:
        """The sum of X^T X, symmetric."""
        assert self._lower_ii is not None, "products were not asked for"
        lower = self._lower_ii.tril()
        return lower + lower.tril(-1).T

    @property
    def samples_ni(self) -> Tensor:
        """Some tokens, evenly spread."""
        return torch.cat(self._samples)


def add_products(lower_ii: Tensor, inputs_ni: Tensor) -> None:
    """Adds X^T X to the lower triangle, by panels: little more than half of the whole product."""
    columns = inputs_ni.shape[1]
    width = -(-columns // PANELS)
    for begin in range(0, columns, width):
        end = min(begin + width, columns)
        lower_ii[begin:end, :end].addmm_(inputs_ni[:, begin:end].T, inputs_ni[:, :end])
