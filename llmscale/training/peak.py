"""The peak of a device's matrix product, for MFU.

CUDA peaks are dense, without sparsity, from NVIDIA's data sheets (A100: 312 TFLOP/s bf16,
19.5 fp32, 156 as TF32; H100 SXM 989 bf16, H100 PCIe 756; V100 125 fp16).
"""

import os
import time

import torch

TERA = 1e12
HALF_PRECISION_PEAKS = {
    "B200": 2250 * TERA,
    "H200": 989 * TERA,
    "H100 PCIe": 756 * TERA,
    "H100": 989 * TERA,
    "A100": 312 * TERA,
    "V100": 125 * TERA,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of one rank's device; None where it is not known.

    On the CPU: measured now, for all cores together, which all ranks share.
    """
    if device.type == "cpu":
        return _measured_cpu_peak()
    name = torch.cuda.get_device_name()
    if precision == "fp32":
        return None
    return next((peak for key, peak in HALF_PRECISION_PEAKS.items() if key in name), None)


def _measured_cpu_peak(size: int = 768, repeats: int = 5) -> float:
    own_threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    left, right = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - begin)
    torch.set_num_threads(own_threads)
    return 2.0 * size**3 / best
