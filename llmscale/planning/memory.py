"""What a rank keeps in a GPU's memory, by part, at the worst pipeline stage.

Activations by Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
Models", sections 4 and 5, for any width of the feed-forward layer and any number of key-value
heads; the model's state by Rajbhandari et al. 2020 (ZeRO), section 3.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from llmscale.planning.hardware import GIBIBYTE, Device
from llmscale.planning.layer_time import IMBALANCE
from llmscale.planning.parameters import StageParameters, rank_parameters, telling_stages
from llmscale.planning.setup import Setup

CONTEXT_BYTES = 1.5 * GIBIBYTE
"""Of the CUDA context, loaded kernels and the workspaces of cuBLAS and cuDNN."""
PROCESS_BYTES = 0.5 * GIBIBYTE
"""Of a process on the CPU with PyTorch loaded."""
CHANNEL_BYTES = 0.35 * GIBIBYTE
"""Buffers that NCCL keeps for each kind of group a rank is in."""
FRAGMENTED = 0.05
"""Of activations: what PyTorch's caching allocator holds in pieces too small to use."""
HEADROOM = 0.20
"""Of a device's memory that a layout leaves free where it is sure to fit: nine tenths of measured
rows are predicted within this (docs/planning.md)."""

Verdict = Literal["fits", "tight", "does not fit"]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the worst stage, by part.

    ``weights``, ``gradients`` and ``optimizer`` are of the layers; ``vocabulary`` is all three of
    the embedding and the output layer.
    """

    weights: float
    gradients: float
    optimizer: float
    vocabulary: float
    activations: float
    logits: float
    buffers: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())

    @property
    def state(self) -> float:
        """Weights, gradients and optimizer."""
        return self.weights + self.gradients + self.optimizer + self.vocabulary


class Need(Protocol):
    """What a rank needs, in bytes."""

    @property
    def total(self) -> float: ...


def verdict(need: Need, device: Device) -> Verdict:
    """Whether a rank's need is within the device's memory, and by a safe margin."""
    if need.total > device.memory_bytes:
        return "does not fit"
    return "fits" if need.total <= (1.0 - HEADROOM) * device.memory_bytes else "tight"


def memory(setup: Setup) -> Memory:
    """What the fullest stage of a pipeline needs.

    The first has the most micro-batches under way, the last the logits.
    """
    needs = (_stage_memory(setup, stage) for stage in telling_stages(setup))
    return max(needs, key=lambda need: need.total)


def _stage_memory(setup: Setup, stage: int) -> Memory:
    held = rank_parameters(setup, stage)
    layers = model_state(setup, held.layers, held.experts)
    activations = stage_activations(setup, stage)
    logits = logit_bytes(setup) if stage == setup.pipeline - 1 else 0.0
    channels = sum(d > 1 for d in (setup.tensor, setup.pipeline, setup.context, setup.data))
    buffers = CONTEXT_BYTES + channels * CHANNEL_BYTES + FRAGMENTED * (activations + logits)
    if setup.device.generation == "cpu":
        buffers = PROCESS_BYTES
    buffers += max(0.0, working_bytes(setup) - logits)  # the loss is done when layers begin
    return Memory(
        *layers,
        vocabulary=sum(model_state(setup, held.tables, 0.0)),
        activations=activations,
        logits=logits,
        buffers=buffers + gathered_bytes(setup, held),
    )


def model_state(setup: Setup, shared: float, experts: float) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer of so many parameters of one rank.

    18 bytes a parameter in mixed precision: 2 + 4 + 12 (Korthikanti et al. 2022, section 4), or
    6 + 12 / d with the distributed optimizer over d ranks; 16 in fp32. FSDP splits weights in
    fp32, their gradients and moments: 16 / d.
    """
    copies = setup.data * setup.context
    whole, split = shared + experts, shared + experts
    if setup.sharding != "none":
        expert_copies = max(1.0, copies * setup.tensor / setup.expert)
        split = shared / copies + experts / expert_copies
    if setup.sharding == "weights":
        return 4.0 * split, 4.0 * split, 8.0 * split
    gradients = split if setup.sharding == "gradients" else whole
    optimizer = setup.optimizer_bytes - (4.0 if setup.number == "fp32" else 0.0)
    return (
        setup.weight_bytes * whole,
        setup.gradient_bytes * gradients + setup.copied_gradient_bytes * whole,
        optimizer * split,
    )


def gathered_bytes(setup: Setup, held: StageParameters) -> float:
    """What FSDP holds whole for a while: two layers' weights and gradients.

    In a pipeline, all of a stage's, since micro-batches follow each other (torchtitan's
    ``fsdp_reshard_after_forward: default``).
    """
    if setup.sharding != "weights":
        return 0.0
    layers = 1 if setup.pipeline > 1 else max(1, setup.most_layers) / 2
    return held.total / layers * (setup.weight_bytes + setup.gradient_bytes)


def stage_activations(setup: Setup, stage: int) -> float:
    """Bytes kept for the backward pass by a stage, over all micro-batches under way.

    1F1B: ``p - stage`` micro-batches; interleaved, the first stage keeps ``1 + (p - 1) / (p v)``
    times all layers' of one (Korthikanti et al. 2022, section 4.2.3).
    """
    p, v = setup.pipeline, setup.virtual_pipeline
    layers = sum(setup.stage_layers[stage::p])
    layer = layer_activations(setup)
    flight = float(min(setup.micro_batches, p - stage))
    if v > 1:
        chunks = min(setup.micro_batches * v, 2 * (p - stage - 1) + (v - 1) * p + 1)
        flight = chunks / v
    again = whole_layer_activations(setup) if setup.recompute == "full" else 0.0
    return layers * layer * flight + again


def kept_input(setup: Setup) -> float:
    """A layer's input alone: full recompute keeps 2 sbh (section 5)."""
    share = setup.tensor if setup.sequence_parallel else 1
    return setup.weight_bytes * setup.rank_tokens * setup.architecture.hidden_size / share


def layer_activations(setup: Setup) -> float:
    """Bytes that one layer keeps of one micro-batch, as ``setup.recompute`` says."""
    kept = whole_layer_activations(setup)
    if setup.recompute == "full":
        again = setup.recomputed_layers
        return again * kept_input(setup) + (1.0 - again) * kept
    if setup.recompute == "selective" and setup.kernels == "unfused":
        kept -= score_bytes(setup)
    if setup.recompute == "operators":
        kept *= 0.5
    return kept


def whole_layer_activations(setup: Setup) -> float:
    """Bytes of one layer without recompute.

    Equation 2 of the paper, ``sbh (10 + 24/t + 5as/(ht))``, with its terms written out: inputs of
    norms and of the first linear layers, and dropout's masks, are whole on every tensor rank, or
    split with sequence parallelism (equation 4); queries, keys and values, the input of
    attention's output layer and the inside of the feed-forward layer are split.
    """
    model, t = setup.architecture, setup.tensor
    element = setup.weight_bytes
    linear = {"fp8": 1.0, "fp4": 1.0}.get(setup.number, float(element))
    width, keys = model.attention_heads * model.head, model.groups * model.head
    whole = model.hidden_size * (2 * element + 2 * linear + 2 * setup.dropout)
    inner = (2 if model.gated_ffn else 1) * element * model.ffn + linear * model.ffn
    if model.experts:
        inner *= model.experts_per_token * IMBALANCE
        whole += model.hidden_size * linear * model.experts_per_token
    split = (width + 2 * keys) * element + width * linear + inner
    share = t if setup.sequence_parallel else 1
    kept = setup.rank_tokens * (whole / share + split / t)
    return kept + score_bytes(setup)


def score_bytes(setup: Setup) -> float:
    """Attention's scores, ``5 a s^2 b / t``: softmax, dropout's mask and output.

    Fused kernels keep a maximum and a sum of each row instead.
    """
    model = setup.architecture
    heads = model.attention_heads / setup.tensor
    if setup.kernels != "unfused":
        return 4.0 * setup.rank_tokens * heads
    element = setup.weight_bytes
    each = 2 * element + 1 if setup.dropout else element
    return each * setup.rank_tokens * setup.sequence_length * heads


def logit_bytes(setup: Setup) -> float:
    """Logits of one micro-batch, in fp32 for the loss, and their gradient."""
    model = setup.architecture
    if model.scored:
        return 0.0
    columns = model.padded_vocabulary(setup.vocabulary, setup.tensor) / setup.tensor
    return setup.rank_tokens * columns * (2 * setup.weight_bytes + 4.0)


def working_bytes(setup: Setup) -> float:
    """What one layer's backward pass needs beside what was kept: gradients of its activations."""
    model = setup.architecture
    width = max(model.ffn * (2 if model.gated_ffn else 1), model.hidden_size) / setup.tensor
    return 2 * setup.weight_bytes * setup.rank_tokens * (width + model.hidden_size)
