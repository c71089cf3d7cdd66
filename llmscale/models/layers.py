"""The parts that layers of all families are specified from, of megatron-core's own modules."""

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules

from llmscale.models.attention import CoreAttention
from llmscale.models.norms import Norm

LINEARS = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
FEED_FORWARD = ModuleSpec(module=MLP, submodules=LINEARS)


def self_attention(mask: AttnMaskType, query_key_norm: bool = False) -> ModuleSpec:
    """Self-attention with our core, and on request with norms of queries and keys."""
    norm = Norm if query_key_norm else IdentityOp
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=CoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )
