"""What is kept of a layer's inputs over the calibration.

Shape legend: n tokens, i inputs (columns).
"""

import torch
from torch import Tensor

from llmscale.parallel import probes, shares
from llmscale.quantization.activations import InputGrid, input_grid, token_grid
from llmscale.quantization.schemes import ActivationFormat

PANELS = 4
SAMPLES_A_WINDOW = 16


class InputStatistics:
    """Of all tokens that reach a layer: the sum of X^T X, each column's range, samples.

    Args:
        with_products: whether the sum of X^T X, the Hessian, is wanted.
        with_range: whether the least and greatest inputs, and samples, are.
    """

    def __init__(self, columns: int, with_products: bool, with_range: bool) -> None:
        self.tokens = 0
        self._with_range = with_range
        self.least_i = torch.zeros(columns)
        self.most_i = torch.zeros(columns)
        self._samples: list[Tensor] = []
        self._lower_ii = torch.zeros(columns, columns) if with_products else None

    def add(self, inputs: Tensor) -> None:
        """Takes in more tokens: all dimensions but the last."""
        inputs_ni = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += len(inputs_ni)
        if self._lower_ii is not None:
            add_products(self._lower_ii, inputs_ni)
        if self._with_range:
            inputs_ni = inputs_ni.float()
            least, most = inputs_ni.aminmax(dim=0)
            self.least_i = torch.minimum(self.least_i, least)
            self.most_i = torch.maximum(self.most_i, most)
            # Not the first token, whose inputs are like no other's: it would count too much.
            stride = max(1, len(inputs_ni) // SAMPLES_A_WINDOW)
            self._samples.append(inputs_ni[stride // 2 :: stride].clone())

    def join(self) -> None:
        """Takes in what the other ranks have; collective."""
        self.tokens = int(shares.added(torch.tensor(self.tokens)))
        if self._with_range:
            self.least_i = -shares.greatest(-self.least_i)
            shares.greatest(self.most_i)
            self._samples = shares.in_order(self._samples)
        if self._lower_ii is not None:
            shares.added(self._lower_ii)

    @property
    def finite(self) -> bool:
        """Whether what was seen is made of numbers."""
        seen = [self.largest_i, *([] if self._lower_ii is None else [self._lower_ii.diagonal()])]
        return all(bool(one.isfinite().all()) for one in seen)

    @property
    def largest_i(self) -> Tensor:
        """The greatest magnitudes."""
        return torch.maximum(self.most_i, -self.least_i)

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

    def fixed_grid(
        self, form: ActivationFormat, dtype: torch.dtype, scales_i: Tensor | None = None
    ) -> InputGrid:
        """That of all inputs of the calibration, divided by scales."""
        least_i, most_i = self.least_i, self.most_i
        if scales_i is not None:
            least_i, most_i = least_i / scales_i, most_i / scales_i
        return input_grid(least_i.min().reshape(1), most_i.max().reshape(1), form, dtype)

    def rounded_samples(
        self, form: ActivationFormat, dtype: torch.dtype, scales_i: Tensor | None = None
    ) -> Tensor:
        """The samples [n, i], divided by scales, as a format rounds them."""
        inputs_ni = self.samples_ni if scales_i is None else self.samples_ni / scales_i
        if form.dynamic:
            return token_grid(inputs_ni, form).rounded(inputs_ni)
        return self.fixed_grid(form, dtype, scales_i).rounded(inputs_ni)


def add_products(lower_ii: Tensor, inputs_ni: Tensor) -> None:
    """Adds X^T X to the lower triangle, by panels: little more than half of the whole product."""
    columns = inputs_ni.shape[1]
    width = -(-columns // PANELS)
    if probes.quick_bf16():
        inputs_ni = inputs_ni.bfloat16()
    for begin in range(0, columns, width):
        end = min(begin + width, columns)
        lower_ii[begin:end, :end] += inputs_ni[:, begin:end].T @ inputs_ni[:, :end]
