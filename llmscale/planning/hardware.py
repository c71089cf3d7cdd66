"""What the planner knows of a device: figures of the makers' data sheets, each with its source."""

import os
import re
import time
from dataclasses import dataclass, field, replace
from typing import Literal

from llmscale.errors import RecipeError
from llmscale.settings import choices, shown

CPU_CALL_SECONDS = 25e-6
"""Of one operation of PyTorch on one core, with its part of autograd."""
CPU_MESSAGE_SECONDS = 5e-4
"""Of one message between gloo ranks of a machine."""

Generation = Literal["cpu", "volta", "ampere", "hopper", "blackwell"]
Number = Literal["fp32", "half", "fp8", "fp4"]
"""What a matrix product multiplies: ``half`` is bf16 or fp16."""

TERA, GIGA, GIBIBYTE = 1e12, 1e9, 2**30


@dataclass(frozen=True)
class Device:
    """One GPU, or the CPU of a machine.

    Attributes:
        peaks: dense FLOP/s of matrix products by what they multiply, at the boost clock.
        plain_peak: FLOP/s in fp32 without tensor cores, as PyTorch multiplies fp32.
        processors: streaming multiprocessors, over which a product's tiles are dealt.
        memory_bytes: what the driver reports as total.
        memory_bandwidth: bytes a second.
        watts: the power limit.
        domain: devices that reach each other by NVLink.
        link_bandwidth: of NVLink, bytes a second of one device in one direction.
        network_bandwidth: across domains, likewise.
        call_seconds: of starting an operation, where that is the device's own (a CPU's).
        message_seconds: of a message without its bytes, likewise.
        blocking: the host waits for each kernel before it starts the next
            (``CUDA_LAUNCH_BLOCKING=1``).
        sources: where the figures are from.
    """

    name: str
    generation: Generation
    peaks: dict[Number, float]
    plain_peak: float
    processors: int
    memory_bytes: float
    memory_bandwidth: float
    watts: float
    domain: int
    link_bandwidth: float
    network_bandwidth: float
    call_seconds: float | None = None
    message_seconds: float | None = None
    blocking: bool = False
    sources: tuple[str, ...] = field(default=(), repr=False)

    def peak(self, number: Number) -> float:
        """FLOP/s of a matrix product; of the next wider numbers where the device lacks these."""
        wider: tuple[Number, ...] = ("fp4", "fp8", "half", "fp32")
        for name in wider[wider.index(number) :]:
            if name in self.peaks:
                return self.peaks[name]
        return self.plain_peak

    def shared(self, ranks: int) -> "Device":
        """A CPU's part for each of its ranks; a GPU is one rank's alone."""
        if self.generation != "cpu":
            return self
        crowd = max(1.0, ranks / self.processors)
        return replace(
            self,
            peaks={number: peak / ranks for number, peak in self.peaks.items()},
            plain_peak=self.plain_peak / ranks,
            memory_bytes=self.memory_bytes / ranks,
            memory_bandwidth=self.memory_bandwidth / ranks,
            domain=ranks,
            link_bandwidth=self.link_bandwidth / ranks,
            network_bandwidth=self.network_bandwidth / ranks,
            call_seconds=CPU_CALL_SECONDS * crowd,
            message_seconds=CPU_MESSAGE_SECONDS * crowd,
        )

    def __hash__(self) -> int:
        return hash((self.name, self.network_bandwidth, self.memory_bandwidth))


A100_SHEET = "NVIDIA A100 data sheet (2021): 312 TFLOP/s, 400 W, NVLink 600 GB/s both ways"
H100_SHEET = "NVIDIA H100 data sheet (2023), dense: half of the sparse figures"
BLACKWELL_SHEET = "NVIDIA Blackwell and DGX B200/GB200/B300/GB300 data sheets (2024, 2025), dense"
POD_NETWORK = "DGX SuperPOD reference architectures: one port a GPU: 200 (A100), 400 (H100, B200), "
NETWORK = POD_NETWORK + "800 Gb/s (B300)"

_V100 = Device(
    name="V100-32GB",
    generation="volta",
    peaks={"half": 125 * TERA},
    plain_peak=15.7 * TERA,
    processors=80,
    memory_bytes=31.7 * GIBIBYTE,
    memory_bandwidth=900 * GIGA,
    watts=300,
    domain=8,
    link_bandwidth=150 * GIGA,
    network_bandwidth=12.5 * GIGA,
    sources=("NVIDIA V100 data sheet (2020), SXM2 32 GB", "DGX-1: four 100 Gb/s ports, 8 GPUs"),
)
_A100 = Device(
    name="A100-80GB",
    generation="ampere",
    peaks={"half": 312 * TERA},
    plain_peak=19.5 * TERA,
    processors=108,
    memory_bytes=79.3 * GIBIBYTE,
    memory_bandwidth=2039 * GIGA,
    watts=400,
    domain=8,
    link_bandwidth=300 * GIGA,
    network_bandwidth=25 * GIGA,
    sources=(A100_SHEET, NETWORK),
)
_H100 = Device(
    name="H100-80GB",
    generation="hopper",
    peaks={"half": 989 * TERA, "fp8": 1979 * TERA},
    plain_peak=67 * TERA,
    processors=132,
    memory_bytes=79.6 * GIBIBYTE,
    memory_bandwidth=3350 * GIGA,
    watts=700,
    domain=8,
    link_bandwidth=450 * GIGA,
    network_bandwidth=50 * GIGA,
    sources=(H100_SHEET, NETWORK),
)
_B200 = Device(
    name="B200",
    generation="blackwell",
    peaks={"half": 2250 * TERA, "fp8": 4500 * TERA, "fp4": 9000 * TERA},
    plain_peak=75 * TERA,
    processors=148,
    memory_bytes=179.1 * GIBIBYTE,
    memory_bandwidth=7700 * GIGA,
    watts=1000,
    domain=8,
    link_bandwidth=900 * GIGA,
    network_bandwidth=50 * GIGA,
    sources=(BLACKWELL_SHEET, NETWORK),
)
_GB200 = replace(
    _B200,
    name="GB200",
    peaks={"half": 2500 * TERA, "fp8": 5000 * TERA, "fp4": 10000 * TERA},
    plain_peak=80 * TERA,
    memory_bytes=185.0 * GIBIBYTE,
    memory_bandwidth=8000 * GIGA,
    watts=1200,
    domain=72,
)

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _V100,
        replace(
            _A100,
            name="A100-40GB",
            memory_bytes=39.4 * GIBIBYTE,
            memory_bandwidth=1555 * GIGA,
        ),
        _A100,
        _H100,
        replace(
            _H100,
            name="H100-PCIe",
            peaks={"half": 756 * TERA, "fp8": 1513 * TERA},
            plain_peak=51 * TERA,
            processors=114,
            memory_bandwidth=2000 * GIGA,
            watts=350,
            domain=2,
            link_bandwidth=300 * GIGA,
        ),
        replace(
            _H100,
            name="H100-96GB-HBM2e-500W",
            memory_bytes=95.0 * GIBIBYTE,
            memory_bandwidth=2400 * GIGA,
            watts=500,
            sources=(
                H100_SHEET,
                "torchtitan benchmarks/llama3_h100_202412_torchtitan.md: 96 GB of HBM2e at "
                "2.4 TB/s, 500 W, 400 Gb/s a GPU",
            ),
        ),
        replace(
            _H100,
            name="H200",
            memory_bytes=140.4 * GIBIBYTE,
            memory_bandwidth=4800 * GIGA,
            sources=("NVIDIA H200 data sheet (2024), dense", NETWORK),
        ),
        _B200,
        replace(
            _B200,
            name="B300",
            peaks={**_B200.peaks, "fp4": 13500 * TERA},
            memory_bytes=268.6 * GIBIBYTE,
            memory_bandwidth=8000 * GIGA,
            watts=1100,
            network_bandwidth=100 * GIGA,
        ),
        _GB200,
        replace(
            _GB200,
            name="GB300",
            peaks={**_GB200.peaks, "fp4": 15000 * TERA},
            memory_bytes=277.6 * GIBIBYTE,
            watts=1400,
            network_bandwidth=100 * GIGA,
        ),
    )
}
"""By the name a user gives; what ``--gpu`` and a table's column ``gpu`` may also say is matched
by ``find_device``."""

DEFAULT_SIZES = {"V100": "V100-32GB", "A100": "A100-80GB", "H100": "H100-80GB"}


def find_device(name: str) -> Device:
    """The device of a name as tables and people write it: ``h100``, ``A100 SXM 40GB``, ``GB300``.

    Raises:
        RecipeError: if there is none.
    """
    wanted = re.sub(r"[^A-Z0-9]", "", name.upper()).removeprefix("NVIDIA")
    if wanted == "CPU":
        return measured_cpu()
    for known, device in DEVICES.items():
        if wanted == re.sub(r"[^A-Z0-9]", "", known.upper()):
            return device
    chip = next((c for c in ("GB300", "GB200", "B300", "B200", "H200") if c in wanted), None)
    if chip is not None:
        return DEVICES[chip]
    if "H100" in wanted and ("PCIE" in wanted or "NVL" in wanted):
        return DEVICES["H100-PCIe"]
    if "H100" in wanted and ("96G" in wanted or "500W" in wanted):
        return DEVICES["H100-96GB-HBM2e-500W"]
    if "A100" in wanted and "40G" in wanted:
        return DEVICES["A100-40GB"]
    usual = next((size for chip, size in DEFAULT_SIZES.items() if chip in wanted), None)
    if usual is None:
        raise RecipeError(f"--gpu {shown(name)}: is not known; use {choices([*DEVICES, 'cpu'])}")
    return DEVICES[usual]


def measured_cpu(size: int = 768, repeats: int = 25) -> Device:
    """This machine's CPU as one device that all ranks share, measured now by NumPy.

    Matrix products in fp32 with all threads of its BLAS, and copies of an array of 1 MiB, as
    large as a small model's activations; what ranks send each other goes through memory as well.
    """
    import numpy
    import psutil

    left = numpy.random.default_rng(0).random((size, size), dtype=numpy.float32)
    product = _quickest(lambda: left @ left, repeats)
    block = numpy.zeros(2**18, dtype=numpy.float32)
    copy = _quickest(block.copy, repeats)
    peak = 2.0 * size**3 / product
    bandwidth = 2.0 * block.nbytes / copy
    return Device(
        name="CPU",
        generation="cpu",
        peaks={"fp32": peak},
        plain_peak=peak,
        processors=os.cpu_count() or 1,
        memory_bytes=float(psutil.virtual_memory().total),
        memory_bandwidth=bandwidth,
        watts=0,
        domain=os.cpu_count() or 1,
        link_bandwidth=bandwidth,
        network_bandwidth=bandwidth,
        sources=(f"measured now: a product of {size} x {size} in fp32, a copy of 1 MiB",),
    )


def _quickest(call: object, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        call()  # type: ignore[operator]
        best = min(best, time.perf_counter() - begin)
    return best
