"""How long ranks wait for each other's messages, by collective, size, group and topology."""

from dataclasses import dataclass

from llmscale.planning.constants import Constants
from llmscale.planning.hardware import Device


@dataclass(frozen=True)
class Group:
    """Ranks that talk: ``size`` of them, each ``stride`` ranks after the one before."""

    size: int
    stride: int = 1

    def inside(self, domain: int) -> int:
        """Of them on one NVLink domain."""
        return max(1, min(self.size, domain // self.stride))


@dataclass(frozen=True)
class Network:
    """NVLink inside a domain, a port of the network a GPU across them."""

    device: Device
    constants: Constants

    @property
    def link_seconds(self) -> float:
        """Of a message inside a domain, without its bytes."""
        own = self.device.message_seconds
        return self.constants.link_seconds if own is None else own

    def gather(self, whole: float, group: Group) -> float:
        """Seconds of an all-gather, or a reduce-scatter, of ``whole`` bytes over a group.

        By rings (Patarasuk and Yuan 2009): a rank sends ``(n - 1) / n`` of all. Across domains as
        many ports carry a group as it has ranks in one domain; the slower of the two
        networks decides.
        """
        n = group.size
        if n == 1:
            return 0.0
        inside = group.inside(self.device.domain)
        across = -(-n // inside)
        constants, device = self.constants, self.device
        bandwidth = device.link_bandwidth * constants.link if inside > 1 else float("inf")
        if across > 1:
            ports = inside * device.network_bandwidth * constants.network
            bandwidth = min(bandwidth, ports)
        latency = (inside - 1) * self.link_seconds + (across - 1) * constants.network_seconds
        return whole * (n - 1) / n / bandwidth + latency

    def reduce(self, whole: float, group: Group) -> float:
        """Seconds of an all-reduce: a reduce-scatter and an all-gather."""
        return 2 * self.gather(whole, group)

    def exchange(self, held: float, group: Group) -> float:
        """Seconds of an all-to-all in which a rank sends ``held`` bytes, part of it to itself."""
        n = group.size
        if n == 1:
            return 0.0
        inside = group.inside(self.device.domain)
        constants, device = self.constants, self.device
        near = held * (inside - 1) / n / (device.link_bandwidth * constants.link)
        far = held * (n - inside) / n / (device.network_bandwidth * constants.network)
        hop = constants.network_seconds if n > inside else self.link_seconds
        return max(near, far) + hop

    def send(self, message: float, stride: int) -> float:
        """Seconds of a message to the rank ``stride`` further on."""
        constants, device = self.constants, self.device
        if stride < device.domain:
            return message / (device.link_bandwidth * constants.link) + self.link_seconds
        speed = device.network_bandwidth * constants.network
        return message / speed + constants.network_seconds
