"""Memory against the figures of Korthikanti et al. 2022 and of ZeRO, and against measured runs."""

import pytest

from llmscale.planning.constants import Constants
from llmscale.planning.hardware import DEVICES, GIBIBYTE
from llmscale.planning.memory import memory, model_state, verdict
from llmscale.planning.validate import Predicted, validate
from tests.planning.cases import PUBLISHED, llama_70b, megatron_2022

STATE = {"22B": 45.56, "175B": 45.56, "530B": 31.64, "1T": 32.96}
TENSOR_ONLY = {"22B": 59.25, "175B": 66.84, "530B": 114.0, "1T": 131.25}
SELECTIVE = {"22B": 9.56, "175B": 12.35, "530B": 23.08, "1T": 26.56}
"""GiB: Korthikanti et al. 2022, figure 1 and section 4, by their equations."""


@pytest.mark.parametrize("name", STATE)
def test_parameters_and_optimizer_are_as_the_paper_has_them(name: str) -> None:
    need = memory(megatron_2022(name))
    layers = need.weights + need.gradients + need.optimizer
    assert layers / GIBIBYTE == pytest.approx(STATE[name], rel=0.01)


@pytest.mark.parametrize("name", STATE)
def test_activations_of_tensor_parallelism_alone_are_as_the_paper_has_them(name: str) -> None:
    need = memory(megatron_2022(name))
    assert need.activations / GIBIBYTE == pytest.approx(TENSOR_ONLY[name], rel=0.01)


@pytest.mark.parametrize("name", STATE)
def test_selective_recompute_with_sequence_parallelism_keeps_what_the_paper_says(name: str) -> None:
    need = memory(megatron_2022(name, recompute="selective", sequence_parallel=True))
    assert need.activations / GIBIBYTE == pytest.approx(SELECTIVE[name], rel=0.01)


def test_full_recompute_keeps_each_layers_input() -> None:
    model_input = 2 * 2048 * 4 * 6144
    need = memory(megatron_2022("22B", recompute="full"))
    one_layer = TENSOR_ONLY["22B"] * GIBIBYTE / 48
    assert need.activations == pytest.approx(48 * model_input + one_layer, rel=0.01)


@pytest.mark.parametrize(
    ("sharding", "bytes_each"),
    [("none", 18.0), ("optimizer", 6 + 12 / 8), ("gradients", 2 + 16 / 8), ("weights", 16 / 8)],
)
def test_each_stage_of_zero_splits_what_its_paper_says(sharding: str, bytes_each: float) -> None:
    assert sum(model_state(llama_70b(sharding=sharding), 1e9, 0.0)) == bytes_each * 1e9


def test_a_layout_counts_as_fitting_only_with_room_to_spare() -> None:
    setup = llama_70b(recompute="full")
    assert verdict(memory(setup), DEVICES["B200"]) == "fits"
    assert verdict(memory(setup), DEVICES["V100-32GB"]) == "does not fit"


@pytest.fixture(scope="module")
def predicted() -> list[Predicted]:
    return validate(PUBLISHED, Constants())[1]


def test_measured_memory_is_predicted(predicted: list[Predicted]) -> None:
    off = sorted(abs(one.memory_error) for one in predicted if one.memory_error is not None)
    assert len(off) > 100
    assert off[len(off) // 2] < 0.10
    assert off[len(off) * 9 // 10] < 0.20


def test_what_ran_is_not_called_out_of_memory(predicted: list[Predicted]) -> None:
    ran = [one for one in predicted if one.relative_error is not None]
    assert max(one.memory_share for one in ran) < 1.10


def test_what_ran_out_of_memory_is_not_called_fitting(predicted: list[Predicted]) -> None:
    out = [one for one in predicted if one.row.ran_out]
    assert len(out) == 6
    assert all(one.verdict != "fits" for one in out)
