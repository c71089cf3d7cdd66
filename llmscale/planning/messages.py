"""What a layer's ranks wait for each other in one micro-batch."""

from dataclasses import dataclass

from llmscale.planning.communication import Group, Network
from llmscale.planning.layer_time import IMBALANCE, PassTime
from llmscale.planning.setup import Setup


@dataclass(frozen=True)
class LayerMessages:
    """Exposed seconds of one layer's messages for one micro-batch, forward and backward."""

    tensor: tuple[float, float]
    context: tuple[float, float]
    expert: tuple[float, float]

    @property
    def forward(self) -> float:
        """All of the forward pass."""
        return self.tensor[0] + self.context[0] + self.expert[0]

    @property
    def backward(self) -> float:
        """All of the backward pass."""
        return self.tensor[1] + self.context[1] + self.expert[1]


def layer_messages(setup: Setup, network: Network, layer: PassTime) -> LayerMessages:
    """What a layer's ranks wait for each other."""
    return LayerMessages(
        _tensor_messages(setup, network, layer),
        _context_messages(setup, network),
        _expert_messages(setup, network),
    )


def _tensor_messages(setup: Setup, network: Network, layer: PassTime) -> tuple[float, float]:
    """Two all-reduces of a layer's output forward and two backward (Shoeybi et al. 2019).

    With sequence parallelism each is a reduce-scatter and an all-gather, and the backward pass
    gathers both inputs once more, beside a product (Korthikanti et al. 2022, section 4.2.2).
    """
    if setup.tensor == 1:
        return 0.0, 0.0
    message = setup.rank_tokens * setup.architecture.hidden_size * setup.weight_bytes
    group = Group(setup.tensor)
    blocks = 1 if setup.architecture.experts else 2  # experts' tokens travel by themselves
    forward = blocks * network.reduce(message, group)
    again = forward * setup.recomputed_layers if setup.recompute == "full" else 0.0
    beside, alone = _backward_messages(setup, blocks * network.gather(message, group))
    hidden = network.constants.hidden_tensor
    if setup.tensor_overlap == "both":
        forward -= min(hidden * forward, layer.forward)
        alone -= hidden * alone
        again -= hidden * again
    if setup.tensor_overlap != "none":
        beside -= min(hidden * beside, layer.backward)
    return forward, beside + alone + again


def _backward_messages(setup: Setup, gathered: float) -> tuple[float, float]:
    """Seconds that can run beside products of the same layer, and that cannot.

    An all-reduce (two times ``gathered``) is beside the weights' gradients. With sequence
    parallelism the reduce-scatter of the inputs' gradients and a second gathering of the inputs
    are beside products; the gathering of the outputs' gradients comes before all of them.
    """
    return (2 * gathered, gathered) if setup.sequence_parallel else (2 * gathered, 0.0)


def _context_messages(setup: Setup, network: Network) -> tuple[float, float]:
    """Keys and values go around all context ranks, and their gradients back (Liu et al. 2023).

    Beside the attention of the pieces before, as far as that lasts.
    """
    c = setup.context
    if c == 1:
        return 0.0, 0.0
    model = setup.architecture
    width = 2 * model.groups * model.head / setup.tensor
    whole = setup.rank_tokens * c * width * setup.weight_bytes
    forward = network.gather(whole, Group(c, setup.tensor))
    exposed = (1 - network.constants.hidden_tensor) * forward
    again = exposed if setup.recompute in ("full", "selective") else 0.0
    return exposed, 2 * exposed + again


def _expert_messages(setup: Setup, network: Network) -> tuple[float, float]:
    """Tokens to their experts and back: two all-to-all exchanges each way (GShard)."""
    model = setup.architecture
    if not model.experts or setup.expert == 1:
        return 0.0, 0.0
    tokens = setup.rank_tokens / setup.tensor * model.experts_per_token * IMBALANCE
    held = tokens * model.hidden_size * setup.weight_bytes
    forward = 2 * network.exchange(held, Group(setup.expert))
    again = forward if setup.recompute == "full" else 0.0
    return forward, forward + again
