"""What all model chunks have in common: what they end in, a loss or scores."""

from typing import Any

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from llmscale.models.cross_entropy import vocabulary_cross_entropy
from llmscale.models.score_head import ScoreHead


class LanguageModel(GPTModel):
    """megatron-core's GPT model whose padding rows of the vocabulary never get probability.

    Args:
        heads: if not 0, the model scores texts instead, by so many heads.
    """

    def __init__(
        self, *arguments: Any, true_vocabulary: int, heads: int = 0, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.true_vocabulary = true_vocabulary
        self.temperature = 1.0
        """What the logits are divided by before they become probabilities."""
        if heads and self.post_process:
            config = self.config
            head: Any = ScoreHead(heads, config.hidden_size, config.sequence_parallel)
            self.output_layer = head

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy a token, ``[b, s]``, over the true vocabulary."""
        if self.temperature != 1:
            logits = logits / self.temperature
        losses_sb = vocabulary_cross_entropy(
            logits,
            labels.transpose(0, 1),
            true_vocabulary=self.true_vocabulary,
            rank=parallel_state.get_tensor_model_parallel_rank(),
            group=parallel_state.get_tensor_model_parallel_group(),
        )
        return losses_sb.transpose(0, 1)
