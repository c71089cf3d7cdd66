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

    volta_products: float = 0.714
    ampere_products: float = 0.788
    hopper_products: float = 0.716
    blackwell_products: float = 0.725
    eight_bit_products: float = 0.948
    four_bit_products: float = 0.662
    power_exponent: float = 0.501
    tile_seconds: float = 2.79e-06
    misaligned_products: float = 0.686
    memory: float = 0.83
    separate_traffic: float = 2.24
    native_attention: float = 0.593
    ported_attention: float = 0.337
    ampere_attention: float = 0.458
    kernel_seconds: float = 6.15e-06
    blocked_seconds: float = 0.00011
    link: float = 0.743
    network: float = 0.663
    link_seconds: float = 3.13e-06
    network_seconds: float = 1.22e-05
    hidden_tensor: float = 0.632
    hidden_data: float = 0.678
    hidden_gathers: float = 0.586
    straggling: float = 0.0111

    def plain(self) -> dict[str, float]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def changed(self, values: dict[str, float]) -> "Constants":
        """With other values of some."""
        return replace(self, **values)


NCCL_TESTS = "nccl-tests' bus bandwidth beside the data sheet's"
CUBLAS = "large cuBLAS products beside the data sheet's peak"

PLAUSIBLE: dict[str, Plausible] = {
    "volta_products": Plausible(0.60, 0.85, f"share of peak that holds, V100: {CUBLAS}"),
    "ampere_products": Plausible(0.75, 0.92, f"share of peak that holds, A100: {CUBLAS}"),
    "hopper_products": Plausible(
        0.60, 0.80, f"share of peak that holds at 700 W, H100 and H200: {CUBLAS}"
    ),
    "blackwell_products": Plausible(
        0.60, 0.85, f"share of peak that holds at 1,000 W, B200 and later: {CUBLAS}"
    ),
    "eight_bit_products": Plausible(
        0.70, 1.0, "share of their own peak that FP8 products hold, beside bf16's share"
    ),
    "four_bit_products": Plausible(
        0.45, 0.9, "share of their own peak that FP4 products hold, beside bf16's share"
    ),
    "power_exponent": Plausible(
        0.33, 1.0, "clock by power limit: power goes with clock x voltage^2, so 1/3 to 1"
    ),
    "tile_seconds": Plausible(
        1e-6, 8e-6, "of a product's tile: filling its pipeline from memory, writing its result"
    ),
    "misaligned_products": Plausible(
        0.55, 0.9, "rate where sizes are no multiples of 128 bytes (NVIDIA's guide, section 3.1)"
    ),
    "memory": Plausible(0.75, 0.93, "share of memory bandwidth that copies reach: STREAM on GPUs"),
    "separate_traffic": Plausible(
        1.3, 3.5, "memory traffic of small operations one by one, beside fused ones"
    ),
    "native_attention": Plausible(
        0.45, 0.75, "share of product rate of flash-attn 3 and cuDNN (Shah et al. 2024, figure 5)"
    ),
    "ported_attention": Plausible(
        0.22, 0.45, "the same of flash-attn 2 on Hopper and later (Shah et al. 2024, figure 5)"
    ),
    "ampere_attention": Plausible(
        0.32, 0.6, "the same of flash-attn on A100, causal (Dao 2023, figure 5)"
    ),
    "kernel_seconds": Plausible(2e-6, 15e-6, "of starting a kernel and draining it"),
    "blocked_seconds": Plausible(
        3e-5,
        1.6e-4,
        "of the host for a kernel counted here, where launches block: two or three launches of "
        "PyTorch, 15 to 50 microseconds each with Python, autograd and waking up",
    ),
    "link": Plausible(0.6, 0.9, f"share of NVLink's bandwidth: {NCCL_TESTS}"),
    "network": Plausible(0.5, 0.95, f"share of a port's bandwidth: {NCCL_TESTS}"),
    "link_seconds": Plausible(1e-6, 10e-6, "of a step of a ring over NVLink"),
    "network_seconds": Plausible(5e-6, 30e-6, "of a step of a ring over the network"),
    "hidden_tensor": Plausible(
        0.4, 0.9, "share of overlapped tensor and context messages that nobody waits for"
    ),
    "hidden_data": Plausible(
        0.5, 0.95, "share of overlapped gradient sums and weight gathers that nobody waits for"
    ),
    "hidden_gathers": Plausible(0.3, 0.95, "the same of FSDP's, layer by layer"),
    "straggling": Plausible(
        0.003, 0.03, "of a step, for each doubling of hosts: all wait for the slowest"
    ),
}
