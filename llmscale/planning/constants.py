"""The few numbers that no data sheet tells: physical, named, fitted (benchmarks/planning.py)."""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple


class Plausible(NamedTuple):
    """What a constant can be, and what it is."""

    low: float
    high: float
    meaning: str


@dataclass(frozen=True)
class Constants:
    """How far real kernels and networks stay behind data sheets; see ``PLAUSIBLE``."""

    volta_products: float = 0.70
    ampere_products: float = 0.86
    hopper_products: float = 0.72
    blackwell_products: float = 0.72
    eight_bit_products: float = 0.85
    four_bit_products: float = 0.65
    power_exponent: float = 0.5
    depth: float = 200.0
    misaligned_products: float = 0.75
    memory: float = 0.85
    separate_traffic: float = 2.0
    native_attention: float = 0.55
    ported_attention: float = 0.30
    ampere_attention: float = 0.45
    kernel_seconds: float = 5e-6
    link: float = 0.75
    network: float = 0.80
    link_seconds: float = 3e-6
    network_seconds: float = 12e-6
    hidden_tensor: float = 0.6
    hidden_data: float = 0.8
    hidden_gathers: float = 0.6
    straggling: float = 0.01

    def plain(self) -> dict[str, float]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def changed(self, values: dict[str, float]) -> "Constants":
        """With other values of some."""
        return replace(self, **values)


PLAUSIBLE: dict[str, Plausible] = {
    "volta_products": Plausible(0.60, 0.85, "share of peak of large products on V100"),
    "ampere_products": Plausible(0.75, 0.92, "the same on A100"),
    "hopper_products": Plausible(0.60, 0.80, "the same on H100 and H200, bf16"),
    "blackwell_products": Plausible(0.60, 0.85, "the same on B200 and later, bf16"),
    "eight_bit_products": Plausible(0.70, 1.0, "8-bit rate"),
    "four_bit_products": Plausible(0.45, 0.9, "4-bit"),
    "power_exponent": Plausible(0.33, 1.0, "clock by power"),
    "depth": Plausible(60, 600, "depth"),
    "misaligned_products": Plausible(0.55, 0.9, ""),
    "memory": Plausible(0.75, 0.93, ""),
    "separate_traffic": Plausible(1.3, 3.5, ""),
    "native_attention": Plausible(0.45, 0.75, ""),
    "ported_attention": Plausible(0.22, 0.45, ""),
    "ampere_attention": Plausible(0.32, 0.6, ""),
    "kernel_seconds": Plausible(2e-6, 15e-6, ""),
    "link": Plausible(0.6, 0.9, ""),
    "network": Plausible(0.5, 0.95, ""),
    "link_seconds": Plausible(1e-6, 10e-6, ""),
    "network_seconds": Plausible(5e-6, 30e-6, ""),
    "hidden_tensor": Plausible(0.4, 0.9, ""),
    "hidden_data": Plausible(0.5, 0.95, ""),
    "hidden_gathers": Plausible(0.3, 0.95, ""),
    "straggling": Plausible(0.003, 0.03, ""),
}
