"""The head of a model that scores texts: a linear layer over the last hidden states."""

import math
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from llmscale.models.weights import initial_tensor

HEAD = "score.weight"
"""What transformers calls its weight, ``[heads, hidden]``."""


def initial_std(hidden_size: int) -> float:
    """The spread of a new head (Stiennon et al. 2020, appendix B.1, as their code has it)."""
    return 1 / math.sqrt(hidden_size + 1)


def new_head(heads: int, hidden_size: int, seed: int) -> Tensor:
    """The weight of a new head, ``[heads, hidden]``; it has no bias."""
    return initial_tensor(HEAD, (heads, hidden_size), initial_std(hidden_size), seed)


class ScoreHead(nn.Module):
    """Scores at every token, the same on all ranks of a tensor-parallel group.

    In place of megatron-core's output layer.
    """

    def __init__(self, heads: int, hidden_size: int, sequence_parallel: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, hidden_size))
        self._sequence_parallel = sequence_parallel

    def forward(self, hidden_sbh: Tensor, **_options: Any) -> tuple[Tensor, None]:
        """Scores ``[s, b, heads]`` in fp32; nothing stands for the bias it does not have."""
        if self._sequence_parallel:
            hidden_sbh = gather_from_sequence_parallel_region(
                hidden_sbh, tensor_parallel_output_grad=False
            )
        return nn.functional.linear(hidden_sbh, self.weight.to(hidden_sbh.dtype)).float(), None
