"""Quantization-aware training: weights are rounded wherever a model computes.

The gradient at the rounded weights moves the weights as they are, as if rounding were the identity
(the straight-through estimator of Bengio, Léonard and Courville 2013; for weights of a network
Jacob et al. 2018, section 3).

Shape legend: o outputs (rows), i inputs (columns).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmscale.quantization.grids import find_grid
from llmscale.quantization.schemes import WeightFormat


@dataclass(frozen=True)
class Rounding:
    """What weights are rounded to: the numbers that ``kind: quantize`` stores them as.

    Attributes:
        scales: the dtype that scales are stored in.
    """

    form: WeightFormat
    group_size: int | None
    scales: torch.dtype

    def rounded(self, weight_oi: Tensor) -> Tensor:
        """The nearest numbers of a whole weight's grid, in fp32."""
        weight_oi = weight_oi.float()
        return find_grid(weight_oi, self.form, self.group_size, self.scales).rounded(weight_oi)


Rounded = Callable[[Tensor], Tensor]
"""Of a rank's part of a weight the same part of the rounded whole; may be collective."""


class RoundedWeights:
    """A model's linear weights, for some time rounded and then again as they were.

    Args:
        weights: by how each is rounded.
    """

    def __init__(self, weights: Mapping[nn.Parameter, Rounded]) -> None:
        self._weights = weights

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, the weights are rounded; a copy of each is kept meanwhile."""
        kept = []
        try:
            with torch.no_grad():
                for weight, rounded in self._weights.items():
                    kept.append((weight, weight.clone()))
                    weight.copy_(rounded(weight))
            yield
        finally:
            with torch.no_grad():
                for weight, before in kept:
                    weight.copy_(before)
