"""How long a training step takes, and where the time goes."""

from dataclasses import dataclass
from math import log2

from llmscale.planning.communication import Group, Network
from llmscale.planning.constants import Constants
from llmscale.planning.kernels import Machine
from llmscale.planning.layer_time import PassTime, embedding_time, layer_time, vocabulary_time
from llmscale.planning.messages import LayerMessages, layer_messages
from llmscale.planning.parameters import StageParameters, most_parameters
from llmscale.planning.schedule import Chunk, busiest, pipeline_estimate, pipeline_seconds
from llmscale.planning.setup import Setup

OPTIMIZER_BYTES = 34.0
"""Moved a parameter by AdamW in mixed precision: gradient, main weight and two moments are read,
the last three written, and the weight in 16 bits; the gradient is read once more for its norm."""
FP32_OPTIMIZER_BYTES = 32.0
NODE = 8
"""GPUs of a host, whose speeds differ."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step at the busiest stage, by what they are for.

    ``waiting`` is for the slowest of all hosts.
    """

    compute: float
    recompute: float
    tensor: float
    context: float
    expert: float
    pipeline: float
    data: float
    bubble: float
    optimizer: float
    waiting: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class MicroBatchTime:
    """Of the parts of a model for one micro-batch, wherever the pipeline has them.

    ``decoder`` is a layer of t5's decoder; of other models the same as ``layer``.
    """

    layer: PassTime
    decoder: PassTime
    messages: LayerMessages
    embedding: PassTime
    vocabulary: PassTime


def micro_batch_time(setup: Setup, constants: Constants) -> MicroBatchTime:
    """What does not depend on stages, copies and the global batch."""
    machine, network = Machine(setup.device, constants), Network(setup.device, constants)
    layer = layer_time(setup, machine)
    decoder = layer_time(setup, machine, decoder=True) if setup.architecture.decoders else layer
    return MicroBatchTime(
        layer,
        decoder,
        layer_messages(setup, network, layer),
        embedding_time(setup, machine),
        vocabulary_time(setup, machine),
    )


def step_time(
    setup: Setup,
    constants: Constants,
    *,
    simulated: bool = True,
    inner: MicroBatchTime | None = None,
) -> StepTime:
    """Predicts a step.

    The pipeline's schedule is simulated with each chunk's time; what remains beyond the work
    of the busiest stage is the bubble.

    Args:
        simulated: or else by the closed form, which is quicker.
        inner: ``micro_batch_time`` of the same setup, where it is known already.
    """
    inner = inner or micro_batch_time(setup, constants)
    network = Network(setup.device, constants)
    m, p = setup.micro_batches, setup.pipeline
    works = _chunk_work(setup, inner)
    on_cpu = setup.device.generation == "cpu"
    if on_cpu:  # where one rank waits, the others have its share of the cores
        mean = sum(works, PassTime()).times(1 / len(works))
        works = [mean] * len(works)
    chunks = [
        Chunk(
            work.forward + layers * inner.messages.forward,
            work.backward + work.recompute + layers * inner.messages.backward,
        )
        for work, layers in zip(works, setup.stage_layers, strict=True)
    ]
    send = _send_seconds(setup, network)
    blocking = send if p > 1 and setup.virtual_pipeline == 1 else 0.0
    schedule = pipeline_seconds if simulated else pipeline_estimate
    whole = schedule(chunks, p, m, send)
    busy = max(range(p), key=lambda stage: sum(c.forward + c.backward for c in chunks[stage::p]))
    own, layers = works[busy::p], sum(setup.stage_layers[busy::p])
    held = most_parameters(setup)
    parts = {
        "compute": m * sum(work.forward + work.backward for work in own),
        "recompute": m * sum(work.recompute for work in own),
        "tensor": m * layers * sum(inner.messages.tensor),
        "context": m * layers * sum(inner.messages.context),
        "expert": m * layers * sum(inner.messages.expert),
        "pipeline": m * 2 * blocking,
        "data": _data_seconds(setup, network, held, chunks[busy::p]),
        "bubble": max(0.0, whole - m * busiest(chunks, p, blocking)) if not on_cpu else 0.0,
        "optimizer": _optimizer_seconds(setup, Machine(setup.device, constants), held),
    }
    hosts = max(1.0, setup.gpus / NODE)
    return StepTime(**parts, waiting=constants.straggling * log2(hosts) * sum(parts.values()))


def _chunk_work(setup: Setup, inner: MicroBatchTime) -> list[PassTime]:
    """Of each model chunk: its layers, and the vocabulary's work of the first and the last."""
    works, done = [], 0
    for layers in setup.stage_layers:
        encoders = max(0, min(layers, setup.architecture.layers - done))
        works.append(inner.layer.times(encoders) + inner.decoder.times(layers - encoders))
        done += layers
    works[0] += inner.embedding
    works[-1] += inner.vocabulary
    return works


def _send_seconds(setup: Setup, network: Network) -> float:
    """Of a micro-batch's activations to the next stage.

    Scattered, each tensor rank sends a part and NVLink makes it whole (Narayanan et al. 2021,
    section 4.1); with sequence parallelism a rank has no more than its part.
    """
    if setup.pipeline == 1:
        return 0.0
    message = setup.rank_tokens * setup.architecture.hidden_size * setup.weight_bytes
    stride = setup.gpus // setup.pipeline
    if setup.sequence_parallel:
        return network.send(message / setup.tensor, stride)
    if setup.scattered_sends:
        gathered = network.gather(message, Group(setup.tensor))
        return network.send(message / setup.tensor, stride) + gathered
    return network.send(message, stride)


def _data_seconds(
    setup: Setup, network: Network, stage: StageParameters, chunks: list[Chunk]
) -> float:
    """Exposed seconds of summing gradients and of gathering weights, over a step."""
    group = Group(setup.data * setup.context, setup.tensor)
    if group.size == 1:
        return 0.0
    weights = stage.total * setup.weight_bytes
    gradients = stage.total * setup.reduced_bytes
    backward = sum(chunk.backward for chunk in chunks)
    forward = sum(chunk.forward for chunk in chunks)
    hidden = network.constants.hidden_data
    if setup.sharding == "weights":
        gather, scatter = network.gather(weights, group), network.gather(gradients, group)
        whole = setup.micro_batches * (2 * gather + scatter)
        if setup.pipeline > 1:
            whole = gather + scatter
        hidden = network.constants.hidden_gathers
        return whole - min(hidden * whole, setup.micro_batches * (forward + backward))
    if setup.sharding in ("optimizer", "gradients"):
        scatter, gather = network.gather(gradients, group), network.gather(weights, group)
        scatter *= 2 if setup.all_reduced else 1
    else:
        scatter, gather = network.reduce(gradients, group), 0.0
    if setup.data_overlap:
        scatter -= min(hidden * scatter, backward)
    if setup.gather_overlap:
        gather -= min(hidden * gather, forward)
    return scatter + gather


def _optimizer_seconds(setup: Setup, machine: Machine, stage: StageParameters) -> float:
    """AdamW reads and writes a rank's share of weights, gradients and moments once."""
    shared = stage.total
    if setup.sharding != "none":
        shared = stage.total / (setup.data * setup.context)
    moved = FP32_OPTIMIZER_BYTES if setup.number == "fp32" else OPTIMIZER_BYTES
    return machine.move(shared * moved, 10)
