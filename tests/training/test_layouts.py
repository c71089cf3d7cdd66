"""The layout never changes the mathematics: every layout equals one rank."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import QUICKSTART
from tests.ranks import layout_ranks, run_recipe
from tests.small import SMALL_MODEL

FIRST_TEN_STEPS = [
    *SMALL_MODEL,
    "stages.pretrain.model.layers=4",
    "stages.pretrain.steps=10",
    "stages.pretrain.optimizer.learning_rate=1.5e-3",
    "stages.pretrain.optimizer.schedule=constant",
    "stages.pretrain.optimizer.warmup_steps=10",
    "stages.pretrain.checkpoint.every=10",
    "stages.pretrain.validation.samples=32",
]
"""The quickstart's first ten steps, of a smaller model: its warm-up reaches 1.5e-3 at the tenth."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
    "data": {"data": 2},
    "tensor and pipeline": {"tensor": 2, "pipeline": 2},
    "all three": {"tensor": 2, "pipeline": 2, "data": 2},
    "all together": {
        "tensor": 2,
        "pipeline": 2,
        "virtual_pipeline": 2,
        "data": 2,
        "sequence": True,
        "distributed": True,
    },
    "larger micro-batches": {"micro": 16},
}


def train(prepared: Path, folder: Path, layout: dict[str, Any], *more: str) -> Path:
    """Ten steps of the quickstart at a layout; returns the pretrain stage's folder."""
    shutil.copytree(prepared, folder)
    layout = dict(layout)
    ranks = layout_ranks(layout)
    overrides = [
        *FIRST_TEN_STEPS,
        f"cluster.ranks_per_node={ranks}",
        f"stages.pretrain.optimizer.distributed={str(layout.pop('distributed', False)).lower()}",
        f"stages.pretrain.recompute={layout.pop('recompute', 'none')}",
        f"stages.pretrain.batch.micro={layout.pop('micro', 4)}",
        f"stages.pretrain.parallel={layout}".replace("True", "true").replace("'", ""),
        *more,
    ]
    run_recipe(QUICKSTART, folder, overrides, ["pretrain"])
    return folder / "pretrain"


def curve(stage: Path, name: str) -> list[float]:
    """A metric, step by step."""
    from llmscale.artifacts import StageFolder

    return [m[name] for m in StageFolder(stage).metrics() if name in m]


def parameters(stage: Path) -> dict[str, Any]:
    """All tensors of the exported model."""
    return {
        name: tensor
        for file in sorted((stage / "hf").glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.fixture(scope="session")
def one_rank(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(prepared, tmp_path_factory.mktemp("one") / "run", LAYOUTS["one rank"])


@pytest.mark.ranks
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one rank"])
def test_ten_steps_at_a_layout_equal_one_rank(
    name: str, prepared: Path, one_rank: Path, tmp_path: Path
) -> None:
    stage = train(prepared, tmp_path / "run", LAYOUTS[name])
    assert len(curve(stage, "loss")) == 10
    assert curve(stage, "loss") == pytest.approx(curve(one_rank, "loss"), rel=1e-5)
    assert curve(stage, "gradient_norm") == pytest.approx(
        curve(one_rank, "gradient_norm"), rel=1e-4
    )
    assert curve(stage, "validation_loss") == pytest.approx(
        curve(one_rank, "validation_loss"), rel=1e-5
    )
    ours, expected = parameters(stage), parameters(one_rank)
    assert ours.keys() == expected.keys()
    worst = {n: float((ours[n] - expected[n]).abs().max()) for n in expected}
    assert max(worst.values()) <= 1e-5, sorted(worst.items(), key=lambda kv: -kv[1])[:3]
