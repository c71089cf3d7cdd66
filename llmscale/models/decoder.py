"""megatron-core's GPT model, with a loss over the true vocabulary."""

from typing import Any

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from llmscale.models.cross_entropy import vocabulary_cross_entropy


class Decoder(GPTModel):
    """megatron-core's GPT model whose padding rows of the vocabulary never get probability."""

    def __init__(self, *arguments: Any, true_vocabulary: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.true_vocabulary = true_vocabulary

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy a token, ``[b, s]``, over the true vocabulary."""
        losses_sb = vocabulary_cross_entropy(
            logits,
            labels.transpose(0, 1),
            true_vocabulary=self.true_vocabulary,
            rank=parallel_state.get_tensor_model_parallel_rank(),
            group=parallel_state.get_tensor_model_parallel_group(),
        )
        return losses_sb.transpose(0, 1)
