"""Which experts a token goes to, and the loss that spreads tokens over experts.

Shape legend: s this rank's tokens of a sequence, b sequences, e experts.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.nn import functional as F


class BalancedRouter(TopKRouter):
    """Top-k routing without dropped tokens, balanced over each sequence.

    megatron-core's own balance loss is taken over a micro-batch of a rank, so that its value
    depends on the layout; and it weighs a rank's part of a sequence by that part's tokens,
    which halves the gradient at two ranks. A sequence's own loss is the same wherever the
    sequence is: ``coefficient * experts * sum over e of share(e) * probability(e)``, where
    share is the part of the sequence's choices that fell on expert e (Fedus et al. 2022,
    equation 4; over sequences as in DeepSeek-AI 2024, section 2.1.2), times its tokens.
    """

    def gating(self, input: Tensor) -> Tensor:
        """Logits in fp32; megatron-core's own needs Transformer Engine for that."""
        return F.linear(input.float(), self.weight.float())

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The weight of each expert for each token and who goes where, both ``[s * b, e]``."""
        experts = self.config.num_moe_experts
        logits_sbe = logits
        probabilities, chosen = topk_routing_with_score_function(
            logits_sbe.reshape(-1, experts), self.topk, score_function="softmax"
        )
        if self.training and torch.is_grad_enabled() and self.config.moe_aux_loss_coeff:
            loss = self._balance_loss(logits_sbe, chosen.view(logits_sbe.shape))
            probabilities = MoEAuxLossAutoScaler.apply(probabilities, loss)
        return probabilities, chosen

    def _balance_loss(self, logits_sbe: Tensor, chosen_sbe: Tensor) -> Tensor:
        """This rank's part of the summed losses; other ranks of a sequence have the rest."""
        counts_be = chosen_sbe.sum(0).float()
        group: Any = self.tp_cp_group
        if group.size() > 1:
            dist.all_reduce(counts_be, group=group)
        share_be = counts_be / counts_be.sum(1, keepdim=True)
        probability_be = logits_sbe.float().softmax(-1).sum(0)
        scale = self.config.moe_aux_loss_coeff * self.config.num_moe_experts
        return scale * (share_be * probability_be).sum()
