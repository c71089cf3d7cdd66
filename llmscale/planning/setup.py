"""One run as the planner sees it: a model on devices at a layout."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from llmscale.data.span_lengths import span_lengths
from llmscale.models.architecture import Architecture
from llmscale.planning.hardware import Device, Number

Recompute = Literal["none", "selective", "operators", "full"]
"""``selective``: attention's scores and values alone (Korthikanti et al. 2022, section 5).
``operators``: every second matrix product and all that is no product, as torchtitan's
``selective_ac_option: op``."""
Sharding = Literal["none", "optimizer", "gradients", "weights"]
"""What data ranks split among them: ZeRO stages 0 to 3 (Rajbhandari et al. 2020); ``optimizer``
is megatron-core's distributed optimizer, ``weights`` is FSDP's FULL_SHARD."""
Kernels = Literal["unfused", "ported", "native"]
"""Attention: scores in memory, as before FlashAttention; flash-attn 1 and 2, made for Ampere,
which PyTorch has as well; or kernels made for the device: flash-attn 3, Transformer Engine's."""
Overlap = Literal["none", "backward", "both"]
"""``backward``: beside the products of weight gradients, as megatron-core does; ``both``: cut into
pieces beside all products, as Transformer Engine's user buffers and PyTorch's async TP do."""
Scaling = Literal["tensor", "row", "block"]
"""Of what a factor of an 8-bit or 4-bit product is common to: a tensor, a row, a block."""


@dataclass(frozen=True)
class Setup:
    """A model's training on ``gpus`` devices.

    Attributes:
        data: copies of the model.
        recomputed_layers: share of a stage's layers that ``recompute`` is for.
        precision: the recipe's word for ``number``.
        fused: small operations run together, by torch.compile or fused kernels.
        tensor_overlap: tensor-parallel messages that run beside matrix products.
        scattered_sends: tensor ranks share the sending of activations to the next stage.
        all_reduced: every data rank gets all summed gradients, even those it does not update.
        data_overlap: gradients are summed over data ranks during the last backward pass.
        gather_overlap: weights are gathered during the first forward pass.
        gradient_bytes: of one gradient as it is summed over micro-batches.
        reduced_bytes: of one gradient as it is sent.
        optimizer_bytes: of a parameter: a main copy in fp32 and two moments.
        copied_gradient_bytes: of a parameter: gradients that are kept a second time.
        dropout: its masks are kept for the backward pass.
    """

    architecture: Architecture
    vocabulary: int
    sequence_length: int
    device: Device
    gpus: int
    global_batch: int
    micro_batch: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    data: int = 1
    layers_per_stage: tuple[int, ...] | None = None
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    recomputed_layers: float = 1.0
    sharding: Sharding = "none"
    precision: str = "bf16"
    number: Number = "half"
    scaling: Scaling = "tensor"
    kernels: Kernels = "native"
    fused: bool = True
    tensor_overlap: Overlap = "none"
    scattered_sends: bool = False
    all_reduced: bool = False
    data_overlap: bool = True
    gather_overlap: bool = False
    gradient_bytes: float = 4.0
    reduced_bytes: float = 4.0
    optimizer_bytes: float = 12.0
    copied_gradient_bytes: float = 0.0
    dropout: bool = False

    @property
    def micro_batches(self) -> int:
        """Forward passes a pipeline makes in a step."""
        return max(1, round(self.global_batch / (self.data * self.micro_batch)))

    @property
    def tokens(self) -> int:
        """That all GPUs together read in a step."""
        return self.global_batch * self.sequence_length

    @property
    def rank_tokens(self) -> float:
        """Of a micro-batch, on one context rank."""
        return self.micro_batch * self.sequence_length / self.context

    @property
    def weight_bytes(self) -> int:
        """Of a weight as products read it from memory before any cast to 8 bits."""
        return 4 if self.number == "fp32" else 2

    @property
    def target_length(self) -> int:
        """Tokens that t5's decoder predicts of a sample."""
        return span_lengths(self.sequence_length).target

    @cached_property
    def stage_layers(self) -> tuple[int, ...]:
        """Layers of each model chunk, in the model's order: chunk ``c`` is on stage ``c % p``."""
        chunks = self.pipeline * self.virtual_pipeline
        if self.layers_per_stage is not None:
            return self.layers_per_stage
        layers = self.architecture.all_layers
        least, more = divmod(layers, chunks)
        if not more:
            return (least,) * chunks
        # The first and last stage have the vocabulary's work, so the others take what is over.
        order = [*range(1, chunks - 1), *([0, chunks - 1] if chunks > 1 else [0])]
        extra = set(order[:more])
        return tuple(least + (chunk in extra) for chunk in range(chunks))

    @property
    def most_layers(self) -> int:
        """Of the stage that has the most."""
        p = self.pipeline
        return max(sum(self.stage_layers[stage::p]) for stage in range(p))
