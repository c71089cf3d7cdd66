"""T5 as one pipeline of layers: the encoder's, then the decoder's.

What travels from layer to layer is the encoder's stream and the decoder's, one after the
other along the sequence. Each layer works on its own part and hands the other on, so that
megatron-core's schedules see layers of one kind and one shape of tensor, and a pipeline may
be cut between any two layers. Where a sequence is split over ranks, each holds its part of
the encoder's stream, then its part of the decoder's.

Shape legend: s the encoder's tokens, t the decoder's, b batch, h hidden size, v this rank's
columns of the vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from llmscale.models.architecture import Architecture
from llmscale.models.attention import CoreAttention
from llmscale.models.language_model import LanguageModel
from llmscale.models.layers import FEED_FORWARD, self_attention
from llmscale.models.norms import Norm
from llmscale.models.relative_positions import RelativeBias


@dataclass(frozen=True)
class Streams:
    """How many of a rank's tokens are the encoder's and the decoder's."""

    encoder: int
    decoder: int

    def parts(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's part of what travels, and the decoder's."""
        encoder, decoder = both.split([self.encoder, self.decoder])
        return encoder, decoder


class EncoderLayer(TransformerLayer):
    """A layer of the encoder; the last one ends with the encoder's norm."""

    def __init__(self, config: Any, *arguments: Any, last: bool, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self.final_layernorm = (
            Norm(config, config.hidden_size, config.layernorm_epsilon) if last else None
        )

    def forward(
        self, hidden_states: Tensor, packed_seq_params: Streams, **_: Any
    ) -> tuple[Tensor, None]:
        """Both streams ``[s + t, b, h]``, of which it changes the encoder's."""
        encoder, decoder = packed_seq_params.parts(hidden_states)
        encoder, _context = super().forward(hidden_states=encoder)
        if self.final_layernorm is not None:
            encoder = self.final_layernorm(encoder)
        return torch.cat([encoder, decoder]), None


class DecoderLayer(TransformerLayer):
    """A layer of the decoder; the last one leaves the encoder's stream behind."""

    def __init__(self, config: Any, *arguments: Any, last: bool, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self.last = last

    def forward(
        self, hidden_states: Tensor, packed_seq_params: Streams, **_: Any
    ) -> tuple[Tensor, None]:
        """Both streams ``[s + t, b, h]``, of which it changes the decoder's."""
        encoder, decoder = packed_seq_params.parts(hidden_states)
        decoder, _context = super().forward(hidden_states=decoder, context=encoder)
        return decoder if self.last else torch.cat([encoder, decoder]), None


class EncoderDecoder(LanguageModel):
    """T5 (Raffel et al. 2020), whose block ``decoder`` has the layers of both stacks."""

    def __init__(self, *, architecture: Architecture, **options: Any) -> None:
        super().__init__(**options)
        self.config.has_cond_embedder = True  # sums the gradients of the copies of the biases
        self.scale = architecture.hidden_size**-0.5 if architecture.tied else 1.0
        self.encoder_bias, self.decoder_bias = (
            RelativeBias(architecture, self.config, causal=causal, first=self.pre_process)
            for causal in (False, True)
        )
        for layer in self.decoder.layers:
            bias = self.encoder_bias if isinstance(layer, EncoderLayer) else self.decoder_bias
            # A bound method, since a module would be registered a second time.
            layer.self_attention.core_attention.position_bias = bias.forward

    def forward(
        self, input_ids: Tensor, decoder_input_ids: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """The loss of each label ``[b, t]``, or without labels the logits ``[b, t, v]``.

        Args:
            input_ids: ``[b, s]``, this rank's part over a context-parallel group.
            decoder_input_ids: ``[b, t]``, as well.

        Returns:
            What travels on, ``[s + t, b, h]``, where this is not the last stage.
        """
        both = None
        if self.pre_process:
            embedded = [self.embedding(ids, None) for ids in (input_ids, decoder_input_ids)]
            both = torch.cat(embedded)
        parts = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        streams = Streams(input_ids.shape[1] // parts, decoder_input_ids.shape[1] // parts)
        hidden = self.decoder(both, attention_mask=None, packed_seq_params=streams)
        if not self.post_process:
            return hidden
        table = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else None
        )
        logits_tbv, _ = self.output_layer(hidden * self.scale, weight=table)
        if labels is None:
            return logits_tbv.transpose(0, 1).contiguous()
        return self.compute_language_model_loss(labels, logits_tbv)


def encoder_decoder_layer(architecture: Architecture, number: int) -> ModuleSpec:
    """Layer ``number`` of the pipeline, from 0, of megatron-core's own parts and our norm."""
    decoding = number >= architecture.layers
    ends = architecture.all_layers if decoding else architecture.layers
    return ModuleSpec(
        module=DecoderLayer if decoding else EncoderLayer,
        params={"last": number == ends - 1},
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=self_attention(
                AttnMaskType.causal if decoding else AttnMaskType.no_mask
            ),
            self_attn_bda=get_bias_dropout_add,
            **(_cross_attention() if decoding else {}),
            pre_mlp_layernorm=Norm,
            mlp=FEED_FORWARD,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _cross_attention() -> dict[str, Any]:
    attention = ModuleSpec(
        module=CrossAttention,
        params={"attn_mask_type": AttnMaskType.no_mask},
        submodules=CrossAttentionSubmodules(
            linear_q=ColumnParallelLinear,
            linear_kv=ColumnParallelLinear,
            core_attention=CoreAttention,
            linear_proj=RowParallelLinear,
        ),
    )
    return {
        "pre_cross_attn_layernorm": Norm,
        "cross_attention": attention,
        "cross_attn_bda": get_bias_dropout_add,
    }
