"""An architecture as megatron-core model chunks: what this rank holds of it."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor
from torch.nn import functional as F

from llmscale.models.architecture import Architecture
from llmscale.models.attention import CoreAttention
from llmscale.models.encoder import Encoder, MaskedHead, encoder_layer_spec
from llmscale.models.encoder_decoder import EncoderDecoder, encoder_decoder_layer
from llmscale.models.language_model import LanguageModel
from llmscale.models.layers import FEED_FORWARD, LINEARS, self_attention
from llmscale.models.norms import Norm
from llmscale.models.router import BalancedRouter
from llmscale.parallel.layout import Layout
from llmscale.parallel.probes import (
    fp8_recipe,
    gradient_accumulation_kernel,
    transformer_engine,
)

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}
"""Of weights and activations; in fp8 matrix products alone are in 8 bits."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}

TRANSFORMER_ENGINE_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Under which keys checkpoints hold the norms, with Transformer Engine's layers or without."""


LOW_RANK = "low_rank"
"""The module beside a linear layer that holds an adapter; no part of an architecture."""


def transformer_config(
    architecture: Architecture,
    layout: Layout,
    precision: str = "fp32",
    recompute: str = "none",
    device: str = "cpu",
) -> TransformerConfig:
    """megatron-core's configuration of an architecture at a layout."""
    dtype = DTYPES[precision]
    recomputing: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    }
    return TransformerConfig(
        num_layers=architecture.all_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.attention_heads,
        num_query_groups=architecture.groups,
        kv_channels=architecture.head,
        ffn_hidden_size=architecture.ffn,
        normalization=architecture.traits.norm,
        layernorm_epsilon=architecture.norm_epsilon,
        gated_linear_unit=architecture.gated_ffn,
        activation_func=ACTIVATIONS[architecture.activation],
        add_bias_linear=architecture.biased,
        add_qkv_bias=architecture.query_bias,
        qk_layernorm=architecture.traits.query_key_norm,
        softmax_scale=1.0 if architecture.traits.positions == "relative" else None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=_left_to_fill,
        output_layer_init_method=_left_to_fill,
        embedding_init_method=_left_to_fill,
        bf16=dtype == torch.bfloat16,
        fp16=precision == "fp16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=(
            layout.virtual_pipeline if layout.virtual_pipeline > 1 else None
        ),
        pipeline_model_parallel_layout=_layer_layout(layout),
        sequence_parallel=layout.sequence,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
        num_moe_experts=architecture.experts,
        moe_ffn_hidden_size=architecture.ffn if architecture.experts else None,
        moe_router_topk=architecture.experts_per_token,
        moe_aux_loss_coeff=architecture.balance_coefficient if architecture.experts else 0.0,
        moe_router_load_balancing_type="none",  # BalancedRouter adds the loss itself
        moe_token_dispatcher_type="alltoall",
        moe_router_dtype="fp32",
        moe_grouped_gemm=architecture.experts is not None and transformer_engine(device),
        hetereogenous_dist_checkpoint=architecture.decoders > 0,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=device == "cuda",  # gloo may still be sending them
        # With two stages the next rank is the previous one too: batched messages get mixed up.
        overlap_p2p_comm=layout.virtual_pipeline > 1,
        batch_p2p_comm=layout.virtual_pipeline == 1,
        bias_activation_fusion=architecture.activation == "silu" and not architecture.experts,
        bias_dropout_fusion=device == "cuda",
        fused_single_qkv_rope=(
            device == "cpu" and architecture.rotary and not architecture.traits.query_key_norm
        ),
        gradient_accumulation_fusion=device == "cpu" or gradient_accumulation_kernel(),
        **recomputing[recompute],
        **(_fp8_settings(device) if precision == "fp8" else {}),
    )


def _fp8_settings(device: str) -> dict[str, Any]:
    """E4M3 forward and E5M2 backward (Micikevicius et al. 2022), where the device has them."""
    recipe = fp8_recipe(device)
    if recipe is None:
        return {}
    history = {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return {"fp8": "hybrid", "fp8_recipe": recipe, **(history if recipe == "delayed" else {})}


def _layer_layout(layout: Layout) -> Any:
    if layout.layers_per_stage is None:
        return None
    stages = [["decoder"] * count for count in layout.layers_per_stage]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return PipelineParallelLayerLayout(stages, layout.pipeline)


def _left_to_fill(tensor: Tensor) -> Tensor:
    """megatron-core's initialization, which also marks sharded parameters, sets no numbers."""
    return tensor


def layer_spec(architecture: Architecture, device: str, adapted: bool = False) -> ModuleSpec:
    """Transformer Engine's layer where the machine has it, else megatron-core's own layer
    with our norm; the core attention and the router are ours in both. A layer that is to have
    an adapter is megatron-core's own: Transformer Engine's hides what its linear layers read."""
    if transformer_engine(device) and not adapted:
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=architecture.experts,
            moe_grouped_gemm=architecture.experts is not None,
            qk_layernorm=architecture.traits.query_key_norm,
        )
        spec.submodules.self_attention.submodules.core_attention = CoreAttention
        if architecture.experts:
            spec.submodules.mlp.submodules.router = BalancedRouter
        return spec
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=self_attention(AttnMaskType.causal, architecture.traits.query_key_norm),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=_mlp_spec(architecture),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=TRANSFORMER_ENGINE_KEYS,
        ),
    )


def _mlp_spec(architecture: Architecture) -> ModuleSpec:
    if not architecture.experts:
        return FEED_FORWARD
    experts = ModuleSpec(module=SequentialMLP, submodules=LINEARS)
    return ModuleSpec(
        module=MoELayer, submodules=MoESubmodules(experts=experts, router=BalancedRouter)
    )


def build_chunks(
    architecture: Architecture,
    vocabulary: int,
    layout: Layout,
    precision: str = "fp32",
    recompute: str = "none",
    device: str = "cpu",
    adapted: bool = False,
) -> list[torch.nn.Module]:
    """This rank's model chunks, one a virtual pipeline stage, with weights not yet set.

    Args:
        adapted: whether they are to have an adapter.
    """
    config = transformer_config(architecture, layout, precision, recompute, device)
    chunks: list[torch.nn.Module] = []
    for stage in range(layout.virtual_pipeline):
        chunk: torch.nn.Module = _build_chunk(
            architecture, vocabulary, layout, config, stage, device, adapted
        )
        _mark_experts(chunk)
        if precision != "fp32":
            chunk = Float16Module(config, chunk)
        # Moving to the meta device would make new parameters, without their marks.
        chunks.append(chunk if device == "meta" else chunk.to(device))
    return chunks


def _mark_experts(chunk: torch.nn.Module) -> None:
    """Says that experts' gradients are summed over ranks of their own, at any layout.

    megatron-core says so at expert-parallel degrees above one alone: at one, tensor-parallel
    ranks would keep gradients of their own part of the sequence, and a checkpoint's optimizer
    would have another form.
    """
    for name, parameter in chunk.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def _build_chunk(
    architecture: Architecture,
    vocabulary: int,
    layout: Layout,
    config: TransformerConfig,
    stage: int,
    device: str,
    adapted: bool,
) -> LanguageModel:
    virtual = stage if layout.virtual_pipeline > 1 else None
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual)
    options: dict[str, Any] = {
        "config": config,
        "transformer_layer_spec": _block_spec(architecture, config, virtual, device, adapted),
        "vocab_size": architecture.padded_vocabulary(vocabulary, layout.tensor),
        "max_sequence_length": architecture.sequence_length,
        "pre_process": first,
        "post_process": last,
        "parallel_output": True,
        "share_embeddings_and_output_weights": architecture.tied,
        "vp_stage": virtual,
        "true_vocabulary": vocabulary,
    }
    if architecture.decoders:
        return EncoderDecoder(architecture=architecture, position_embedding_type="none", **options)
    model = Encoder if architecture.traits.objective == "masked" else LanguageModel
    return model(
        position_embedding_type="rope" if architecture.rotary else "learned_absolute",
        rotary_base=architecture.rotary_base,
        rope_scaling=architecture.rotary_scaling_factor is not None,
        rope_scaling_factor=architecture.rotary_scaling_factor or 1.0,
        heads=len(architecture.scored),
        **options,
    )


def _block_spec(
    architecture: Architecture,
    config: TransformerConfig,
    virtual: int | None,
    device: str,
    adapted: bool,
) -> TransformerBlockSubmodules:
    """The layers of one chunk, and the norm after the last of all."""
    layers = get_num_layers_to_build(config, vp_stage=virtual)
    if architecture.decoders:
        first = get_transformer_layer_offset(config, virtual)
        specs = [encoder_decoder_layer(architecture, first + layer) for layer in range(layers)]
        return TransformerBlockSubmodules(layer_specs=specs, layer_norm=Norm)
    if architecture.traits.objective == "masked":
        specs = [encoder_layer_spec()] * layers
        return TransformerBlockSubmodules(layer_specs=specs, layer_norm=MaskedHead)
    specs = [layer_spec(architecture, device, adapted)] * layers
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=Norm)


def inner_model(chunk: torch.nn.Module) -> LanguageModel:
    """The model within its data-parallel and precision wrappers."""
    while not isinstance(chunk, LanguageModel):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def tensor_group(parameter: torch.nn.Parameter) -> Any:
    """The ranks a parameter is split over: experts are whole on the rank that has them."""
    if getattr(parameter, "allreduce", True):
        return parallel_state.get_tensor_model_parallel_group()
    return parallel_state.get_expert_tensor_parallel_group()


EXPERT_NUMBER = re.compile(r"(?<=\.experts\.local_experts\.)\d+|(?<=\.linear_fc[12]\.weight)\d+$")
"""Where a parameter's name counts the experts of this rank, in both forms of experts."""


def global_parameters(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """A chunk's parameters, by names that count layers and experts over the whole model.

    Those of an adapter are left out.
    """
    model = inner_model(chunk)
    offset = model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0
    experts = model.config.num_moe_experts or 0
    first_expert = parallel_state.get_expert_model_parallel_rank() * (
        experts // parallel_state.get_expert_model_parallel_world_size()
    )
    for name, parameter in model.named_parameters():
        if f".{LOW_RANK}." in name:
            continue
        if name.startswith("decoder.layers."):
            _, _, local, rest = name.split(".", 3)
            name = f"decoder.layers.{int(local) + offset}.{rest}"
        if experts:
            name = EXPERT_NUMBER.sub(lambda found: str(int(found[0]) + first_expert), name)
        yield name, parameter
