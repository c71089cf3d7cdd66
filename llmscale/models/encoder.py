"""BERT's encoder (Devlin et al. 2019, section 3) out of megatron-core's parts.

Shape legend: s this rank's part of the sequence, b batch, h hidden size.
"""

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor
from torch.nn import functional as F

from llmscale.models.architecture import TOKEN_TYPES
from llmscale.models.language_model import LanguageModel
from llmscale.models.layers import FEED_FORWARD, self_attention
from llmscale.models.norms import Norm


class PostNormLayer(TransformerLayer):
    """A layer that normalizes after each residual sum (Vaswani et al. 2017, section 3.1)."""

    def __init__(self, config: TransformerConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        size, epsilon = config.hidden_size, config.layernorm_epsilon
        self.post_attention_layernorm = Norm(config, size, epsilon)
        self.post_mlp_layernorm = Norm(config, size, epsilon)

    def _forward_attention(self, *arguments: Any, **options: Any) -> tuple[Tensor, Any]:
        hidden_sbh, context = super()._forward_attention(*arguments, **options)
        return self.post_attention_layernorm(hidden_sbh), context

    def _forward_mlp(self, *arguments: Any, **options: Any) -> Tensor:
        return self.post_mlp_layernorm(super()._forward_mlp(*arguments, **options))


def encoder_layer_spec() -> ModuleSpec:
    """A post-norm layer whose tokens see each other in both directions.

    Its linear layers are megatron-core's own on every device: Transformer Engine's gain is
    in a norm before them, which such a layer does not have.
    """
    return ModuleSpec(
        module=PostNormLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=self_attention(AttnMaskType.padding),
            self_attn_bda=get_bias_dropout_add,
            mlp=FEED_FORWARD,
            mlp_bda=get_bias_dropout_add,
        ),
    )


class EmbeddingEnd(torch.nn.Module):
    """Adds the first token type to embedded tokens ``[s, b, h]``, and normalizes them.

    It works on each rank's part of the sequence, and its parameters are marked accordingly.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.token_types = torch.nn.Parameter(torch.zeros(TOKEN_TYPES, config.hidden_size))
        self.token_types.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, embedded_sbh: Tensor) -> Tensor:
        return self.layernorm(embedded_sbh + self.token_types[0])


class MaskedHead(torch.nn.Module):
    """What stands between the last layer and the output table, on each rank's ``[s, b, h]``.

    megatron-core builds it in the place of a block's last norm.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(hidden_size, hidden_size)
        for parameter in self.dense.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.layernorm = Norm(config, hidden_size, eps)

    def forward(self, hidden_sbh: Tensor) -> Tensor:
        return self.layernorm(F.gelu(self.dense(hidden_sbh)))


class Encoder(LanguageModel):
    """BERT with its head for masked tokens; the output table has a bias a token."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.pre_process:
            self.embedding_end = EmbeddingEnd(self.config)
        if self.post_process:
            size = self.output_layer.output_size_per_partition
            bias = torch.nn.Parameter(torch.zeros(size))
            set_tensor_model_parallel_attributes(bias, True, 0, 1)
            self.output_layer.bias = bias

    def _preprocess(self, *arguments: Any, **options: Any) -> tuple[Any, ...]:
        embedded_sbh, *rest = super()._preprocess(*arguments, **options)
        if self.pre_process:
            embedded_sbh = self.embedding_end(embedded_sbh)
        return embedded_sbh, *rest
