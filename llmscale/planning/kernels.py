"""How long single kernels take: matrix products, attention, and what only moves memory."""

import math
from dataclasses import dataclass

from llmscale.planning.constants import Constants
from llmscale.planning.hardware import Device, Number
from llmscale.planning.setup import Kernels, Scaling

TILE_ROWS, TILE_COLUMNS = 128, 256
ALIGNED = 64
"""Sizes that are no multiples of so many elements (128 bytes of bf16) slow tensor cores down:
NVIDIA's Matrix Multiplication Background guide, section 3.1 (A100)."""
UNFUSED_DEPTH = 200.0
"""Products over a head's width reach ``1 / sqrt(1 + this / width)`` of the rate of large ones."""
CPU_PRODUCTS = 0.45
"""Rate of a small model's products on one thread a rank, beside a large one on all cores."""
ROW_SCALED_PRODUCTS = 0.60
"""Rate of products with a factor for each row, beside one for each tensor: CUTLASS's kernels
against cuBLAS's on Hopper, pytorch/pytorch's benchmarks of ``_scaled_mm`` (2024)."""


@dataclass(frozen=True)
class Machine:
    """A device and the constants: what single kernels take on it."""

    device: Device
    constants: Constants

    def rate(self, number: Number) -> float:
        """FLOP/s of a large matrix product, as the power limit allows."""
        constants, device = self.constants, self.device
        if device.generation == "cpu":
            return device.peak(number) * CPU_PRODUCTS
        fraction = float(getattr(constants, f"{device.generation}_products"))
        if number == "fp8" and "fp8" in device.peaks:
            fraction *= constants.eight_bit_products
        elif number == "fp4" and "fp4" in device.peaks:
            fraction *= constants.four_bit_products
        return device.peak(number) * fraction * self.power()

    @property
    def call_seconds(self) -> float:
        """Of starting a kernel and draining it, and of the host where it waits for each."""
        own = self.device.call_seconds
        seconds = self.constants.kernel_seconds if own is None else own
        return seconds + (self.constants.blocked_seconds if self.device.blocking else 0.0)

    def power(self) -> float:
        """What a part with a lower power limit keeps of its generation's clock."""
        reference = {"volta": 300, "ampere": 400, "hopper": 700, "blackwell": 1000}
        watts = reference.get(self.device.generation)
        if watts is None:
            return 1.0
        demand = watts * self.device.peak("half") / _reference_peak(self.device)
        return min(1.2, (self.device.watts / demand) ** self.constants.power_exponent)

    def product(
        self,
        rows: float,
        columns: float,
        depth: float,
        number: Number,
        *,
        scaling: Scaling = "tensor",
        output_bytes: float = 2.0,
    ) -> float:
        """Seconds of a ``rows x depth`` by ``depth x columns`` matrix product.

        The larger of two times: arithmetic at the sustained rate, lengthened by the last wave of
        tiles that does not fill the device, by the filling of each tile's pipeline, and by
        sizes that tensor cores do not like; and the moving of its matrices.
        """
        constants, device = self.constants, self.device
        arithmetic = 2.0 * rows * columns * depth / self.rate(number)
        element = {"fp32": 4.0, "half": 2.0, "fp8": 1.0, "fp4": 0.55}[number]
        moved = (rows + columns) * depth * element + rows * columns * output_bytes
        memory = moved / (device.memory_bandwidth * constants.memory)
        if device.generation != "cpu":
            arithmetic /= _filled(rows, columns, device.processors)
            tile = 2.0 * TILE_ROWS * TILE_COLUMNS * depth * device.processors / self.rate(number)
            arithmetic *= 1.0 + constants.tile_seconds / tile
            if min(columns, depth) % ALIGNED or max(columns, depth) % ALIGNED:
                arithmetic /= constants.misaligned_products
            if scaling == "row" and number == "fp8":
                arithmetic /= ROW_SCALED_PRODUCTS
        return max(arithmetic, memory) + self.call_seconds

    def move(self, moved: float, kernels: int = 1) -> float:
        """Seconds of kernels that read and write so many bytes together."""
        speed = self.device.memory_bandwidth * self.constants.memory
        return moved / speed + kernels * self.call_seconds

    def attention(
        self,
        pairs: float,
        heads: float,
        head: float,
        kernels: Kernels,
        number: Number,
    ) -> tuple[float, float]:
        """Seconds of scores, softmax and values, forward and backward.

        Args:
            pairs: of a query and a key, over all samples; under a causal mask half of all
                where the kernels leave the other half out.

        Unfused, scores are written and read by each of its kernels: 11 bytes a score forward
        (product 2, scaled and masked softmax 4, dropout 5) and 2 to read it for the values, 17
        backward, in 16 bits, and the products run over both halves of a causal mask.
        """
        flops = 4.0 * pairs * heads * head
        rate = self.rate("fp32" if number == "fp32" else "half")
        if kernels == "unfused":
            scores = pairs * heads
            if head % 8:
                rate = self.device.plain_peak
            speed = self.device.memory_bandwidth * self.constants.memory
            seconds = self.call_seconds
            products = flops / rate * (1.0 + UNFUSED_DEPTH / head) ** 0.5
            forward = products + 13.0 * scores / speed + 5 * seconds
            return forward, 2 * products + 17.0 * scores / speed + 8 * seconds
        rate *= self.attention_fraction(kernels)
        if head < 128:
            rate *= (head / 128) ** 0.5
        forward = flops / rate + self.call_seconds
        return forward, 2.5 * flops / (0.85 * rate) + 2 * self.call_seconds

    def attention_fraction(self, kernels: Kernels) -> float:
        """Of the rate of a large product."""
        if self.device.generation == "cpu":
            return 0.5
        if self.device.generation in ("volta", "ampere"):
            return self.constants.ampere_attention
        if kernels == "native":
            return self.constants.native_attention
        return self.constants.ported_attention


def _reference_peak(device: Device) -> float:
    return {"volta": 125e12, "ampere": 312e12, "hopper": 989e12, "blackwell": 2250e12}[
        device.generation
    ]


def _filled(rows: float, columns: float, processors: int) -> float:
    """Share of the device that works, over all waves of tiles."""
    tall, wide = math.ceil(rows / TILE_ROWS), math.ceil(columns / TILE_COLUMNS)
    tiles = tall * wide
    waves = tiles / processors
    edges = rows * columns / (tiles * TILE_ROWS * TILE_COLUMNS)
    last = waves / math.ceil(waves)
    return edges * last
