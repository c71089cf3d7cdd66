"""Kernels and collectives: known limits, and that more work never takes less time."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmscale.errors import RecipeError
from llmscale.planning.communication import Group, Network
from llmscale.planning.constants import PLAUSIBLE, Constants
from llmscale.planning.hardware import DEVICES, find_device
from llmscale.planning.kernels import Machine

A100, CONSTANTS = DEVICES["A100-80GB"], Constants()
MACHINE, NETWORK = Machine(A100, CONSTANTS), Network(A100, CONSTANTS)


def share_of_peak(rows: int, columns: int, depth: int) -> float:
    return 2 * rows * columns * depth / MACHINE.product(rows, columns, depth, "half") / 312e12


def test_large_products_run_at_the_sustained_rate_and_small_ones_below() -> None:
    large = share_of_peak(16384, 16384, 16384)
    assert large == pytest.approx(CONSTANTS.ampere_products, rel=0.05)
    assert share_of_peak(512, 1024, 1024) < 0.5 * large
    assert share_of_peak(8192, 14400 // 8, 14400) < 0.8 * share_of_peak(8192, 13824 // 8, 13824)


def test_thin_products_are_bound_by_memory() -> None:
    seconds = MACHINE.product(1, 16384, 16384, "half")
    assert seconds > 2 * 16384**2 / A100.memory_bandwidth


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_a_larger_product_never_takes_less(rows: int, columns: int, depth: int) -> None:
    sizes = (1024 * rows, 1024 * columns, 1024 * depth)
    seconds = MACHINE.product(*sizes, "half")
    for at in range(3):
        more = [size * (2 if here == at else 1) for here, size in enumerate(sizes)]
        assert MACHINE.product(*more, "half") >= seconds


def test_a_ring_sends_what_the_formula_says() -> None:
    inside = NETWORK.gather(1e9, Group(8))
    wire = 1e9 * 7 / 8 / (300e9 * CONSTANTS.link)
    assert inside == pytest.approx(wire + 7 * CONSTANTS.link_seconds)
    assert NETWORK.reduce(1e9, Group(8)) == 2 * inside
    assert NETWORK.gather(1e9, Group(1)) == 0.0


def test_ranks_of_a_node_share_their_ports() -> None:
    alone = NETWORK.gather(1e9, Group(4, stride=8))  # one rank a node, one port
    together = NETWORK.gather(1e9, Group(32, stride=1))  # eight ranks a node, eight ports
    assert 4 < alone / together < 8


def test_a_wider_domain_is_quicker() -> None:
    rack = Network(replace(A100, domain=72), CONSTANTS)
    assert rack.gather(1e9, Group(64)) < NETWORK.gather(1e9, Group(64))
    assert rack.exchange(1e9, Group(64)) < NETWORK.exchange(1e9, Group(64))
    assert rack.send(1e9, 16) < NETWORK.send(1e9, 16)


def test_every_constant_is_plausible_and_explained() -> None:
    assert set(PLAUSIBLE) == set(CONSTANTS.plain())
    for name, value in CONSTANTS.plain().items():
        low, high, meaning = PLAUSIBLE[name]
        assert low <= value <= high, name
        assert meaning


@pytest.mark.parametrize(
    ("written", "device"),
    [
        ("h100", "H100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("H100 PCIe", "H100-PCIe"),
        ("H100-96GB-HBM2e-500W", "H100-96GB-HBM2e-500W"),
        ("A100-SXM4-40GB", "A100-40GB"),
        ("a100", "A100-80GB"),
        ("GB300", "GB300"),
        ("DGX-GB200", "GB200"),
        ("b200", "B200"),
        ("H200 SXM", "H200"),
        ("V100", "V100-32GB"),
    ],
)
def test_devices_are_known_by_what_people_write(written: str, device: str) -> None:
    assert find_device(written).name == device


def test_every_device_has_its_sources() -> None:
    assert all(device.sources for device in DEVICES.values())


def test_an_unknown_device_is_one_line() -> None:
    with pytest.raises(RecipeError, match="--gpu 'tpu': is not known; use V100-32GB"):
        find_device("tpu")
