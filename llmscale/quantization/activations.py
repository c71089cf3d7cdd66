"""How the inputs of layers are rounded while a model computes, as compressed-tensors does it.

Shape legend: n tokens, i inputs (columns).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmscale.quantization.grids import E4M3, E4M3_MOST, stored_scale
from llmscale.quantization.schemes import ActivationFormat

LOWEST, HIGHEST = -128, 127


@dataclass(frozen=True)
class InputGrid:
    """The numbers that inputs may become: (code - zero) * scale; floats have no ``zero``."""

    scale: Tensor
    zero: Tensor | None = None

    def rounded(self, inputs_ni: Tensor) -> Tensor:
        """The nearest inputs on the grid."""
        scaled_ni = inputs_ni / self.scale
        if self.zero is None:
            return scaled_ni.clamp(-E4M3_MOST, E4M3_MOST).to(E4M3).float() * self.scale
        codes_ni = (scaled_ni + self.zero).round_().clamp_(LOWEST, HIGHEST)
        return codes_ni.sub_(self.zero).mul_(self.scale)


def input_grid(
    least: Tensor, most: Tensor, form: ActivationFormat, dtype: torch.dtype
) -> InputGrid:
    """The grid that reaches from the least input to the greatest, and holds zero.

    Scales are numbers of ``dtype``, in which they are stored.
    """
    least, most = least.clamp(max=0), most.clamp(min=0)
    if form.number == "float":
        return InputGrid(stored_scale(torch.maximum(most, -least) / E4M3_MOST, dtype))
    scale = stored_scale((most - least) / (HIGHEST - LOWEST), dtype)
    return InputGrid(scale, (LOWEST - least / scale).round_().clamp_(LOWEST, HIGHEST))


def token_grid(inputs_ni: Tensor, form: ActivationFormat) -> InputGrid:
    """A grid for each token's own inputs, as dynamic formats find them."""
    least_n1, most_n1 = (part[:, None] for part in inputs_ni.aminmax(dim=1))
    return input_grid(least_n1, most_n1, form, inputs_ni.dtype)
