"""The search against all layouts tried one by one, and its promises."""

from dataclasses import replace
from itertools import product

import pytest

from llmscale.models.architecture import Architecture
from llmscale.planning.constants import Constants
from llmscale.planning.forecast import forecast
from llmscale.planning.hardware import DEVICES
from llmscale.planning.memory import memory, verdict
from llmscale.planning.search import search
from llmscale.planning.setup import Setup

CONSTANTS = Constants()
MODEL = Architecture(
    family="llama",
    layers=24,
    hidden_size=4096,
    attention_heads=32,
    key_value_heads=8,
    ffn_size=14336,
    sequence_length=4096,
)


def base(**changed: object) -> Setup:
    settings: dict[str, object] = {
        "architecture": MODEL,
        "vocabulary": 128256,
        "sequence_length": 4096,
        "device": DEVICES["A100-80GB"],
        "gpus": 16,
        "global_batch": 64,
        "tensor_overlap": "backward",
    }
    return Setup(**{**settings, **changed})  # type: ignore[arg-type]


def test_no_layout_tried_by_hand_is_quicker_than_the_best() -> None:
    best = search(base(), CONSTANTS).best[0]
    degrees = product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2), (1, 2, 4), ("none", "full"))
    tried = 0
    for tensor, pipeline, virtual, micro, recompute in degrees:
        data, over = divmod(16, tensor * pipeline)
        if over or (virtual > 1 and (pipeline == 1 or 24 % (pipeline * virtual))):
            continue
        passes, over = divmod(64, data * micro) if data else (0, 1)
        if over or (virtual > 1 and passes % pipeline):
            continue
        setup = base(
            tensor=tensor,
            pipeline=pipeline,
            virtual_pipeline=virtual,
            data=data,
            micro_batch=micro,
            recompute=recompute,
            sequence_parallel=tensor > 1,
            sharding="optimizer" if data > 1 else "none",
        )
        if verdict(memory(setup), setup.device) == "does not fit":
            continue
        tried += 1
        assert forecast(setup, CONSTANTS).step.total >= best.step.total * 0.999
    assert tried > 30


def test_all_found_layouts_fit_and_hold_the_batch() -> None:
    found = search(base(), CONSTANTS)
    assert found.best and found.tried > 100
    for each in found.best:
        setup = each.setup
        assert each.verdict != "does not fit"
        assert setup.tensor * setup.pipeline * setup.context * setup.data == 16
        assert setup.global_batch % (setup.data * setup.micro_batch) == 0
    totals = [each.step.total for each in found.best]
    assert totals == sorted(totals)


def test_what_is_impossible_is_left_out_with_a_reason() -> None:
    found = search(base(device=DEVICES["A100-40GB"]), CONSTANTS)
    assert found.impossible["needs more than the device's memory"] > 0
    assert found.impossible["micro x data does not divide the global batch"] > 0


def test_layers_that_stages_cannot_share_evenly_are_listed() -> None:
    """Llama 3 405B has 126 layers, which no power of two above 2 divides."""
    model = Architecture(
        family="llama",
        layers=126,
        hidden_size=16384,
        attention_heads=128,
        key_value_heads=8,
        ffn_size=53248,
        sequence_length=8192,
    )
    setup = base(architecture=model, device=DEVICES["H100-80GB"], gpus=1024, global_batch=512)
    best = search(replace(setup, sequence_length=8192), CONSTANTS).best[0].setup
    assert best.pipeline >= 4
    assert best.layers_per_stage is not None
    assert len(best.layers_per_stage) == best.pipeline * best.virtual_pipeline
    assert sum(best.layers_per_stage) == 126


def test_eight_bits_are_offered_where_the_device_has_them() -> None:
    precisions = [each.setup.precision for each in search(base(), CONSTANTS).best]
    assert "fp8" not in precisions
    hopper = search(base(device=DEVICES["H100-80GB"]), CONSTANTS).best
    assert hopper[-1].setup.precision == "fp8"
    assert hopper[-1].step.total < hopper[0].step.total


@pytest.mark.parametrize("expert", [1, 2, 8])
def test_experts_move_tokens_where_they_are_split(expert: int) -> None:
    experts = MODEL.model_copy(update={"family": "mixtral", "experts": 8, "experts_per_token": 2})
    setup = base(architecture=experts, data=16, expert=expert, sharding="optimizer")
    step = forecast(setup, CONSTANTS).step
    assert (step.expert > 0) == (expert > 1)


def test_more_of_anything_takes_longer() -> None:
    setup = base(data=16, sharding="optimizer", recompute="full")
    quick = forecast(setup, CONSTANTS).step.total
    more_layers = setup.architecture.model_copy(update={"layers": 48})
    for slower in (
        replace(setup, architecture=more_layers),
        replace(setup, global_batch=128),
        replace(setup, vocabulary=256000),
        replace(setup, device=replace(setup.device, memory_bandwidth=1e12)),
        replace(setup, device=replace(setup.device, network_bandwidth=1e9)),
    ):
        assert forecast(slower, CONSTANTS).step.total > quick
