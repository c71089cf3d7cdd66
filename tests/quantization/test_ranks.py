"""A calibration that ranks share gives what one rank gives, also when their number changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmscale.clusters.base import Job
from llmscale.errors import RecipeError
from llmscale.recipe.recipe import load_recipe
from tests.quantization.small import TEXT, recipe_beside_llama, small_llama
from tests.ranks import answer, run_ranks, run_recipe, settings

RECIPE = f"""
name: shared
cluster: {{on: local, ranks_per_node: 3}}
stages:
  quantized:
    kind: quantize
    model: llama
    scheme: int4-gptq
    calibration: {{text: "{TEXT}", tokens: 640}}
"""

pytestmark = pytest.mark.ranks


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return recipe_beside_llama(tmp_path, RECIPE)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def require_alike(ours: Path, theirs: Path) -> None:
    """Codes may differ where a sum of many numbers lies between two of them."""
    found, expected = tensors(ours), tensors(theirs)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        if wanted.is_floating_point():
            torch.testing.assert_close(found[name], wanted, msg=name)
        else:
            bytes_apart = found[name].view(torch.uint8) != wanted.view(torch.uint8)
            assert bytes_apart.float().mean() < 0.002, name


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["stages.quantized.scheme=int4-awq", "stages.quantized.key_value_cache=fp8"],
        ["stages.quantized.scheme=int8-static"],
        ["stages.quantized.scheme=mixed", "stages.quantized.bits=6"],
    ],
    ids=["int4-gptq", "int4-awq and cache", "int8-static", "mixed"],
)
def test_three_ranks_give_what_one_does(recipe: Path, tmp_path: Path, overrides: list[str]) -> None:
    alone = run_recipe(recipe, tmp_path / "alone", overrides).stage("quantized")
    shared = run_recipe(recipe, tmp_path / "shared", [*overrides, "stages.quantized.ranks=3"])
    require_alike(shared.stage("quantized").hf, alone.hf)
    ours, theirs = (each.manifest()["metrics"] for each in (shared.stage("quantized"), alone))
    assert {**ours, "quantize_seconds": 0} == {**theirs, "quantize_seconds": 0}


def quantized(job: Job, rank: int, rendezvous: str) -> None:
    """Quantizes a folder; given a number of blocks to stop after, it stops there."""
    from llmscale.parallel.world import joined_world
    from llmscale.quantization.quantize import Listener, quantize
    from llmscale.quantization.schemes import Quantization

    given: dict[str, Any] = settings(job)

    def stop(done: int, blocks: int) -> None:
        if done == given["stop"]:
            raise KeyboardInterrupt

    with joined_world(rank=rank, ranks=job.task.ranks, rendezvous=rendezvous, device="cpu"):
        try:
            quantize(
                Path(given["model"]),
                Path(given["target"]),
                Quantization(scheme="int4-gptq"),
                [TEXT.read_text(encoding="utf-8")],
                tokens=640,
                listener=Listener(stop),
            )
        except KeyboardInterrupt:
            answer(job, rank, "stopped")
        else:
            answer(job, rank, "finished")


def test_another_number_of_ranks_goes_on_where_some_stopped(tmp_path: Path) -> None:
    model = small_llama(tmp_path / "llama", num_hidden_layers=4)
    targets = {name: tmp_path / name for name in ("whole", "parted")}

    def told(target: str, ranks: int, stop: int | None) -> Any:
        place = {"model": str(model), "target": str(targets[target]), "stop": stop}
        return run_ranks(quantized, ranks, tmp_path / f"{target}-{ranks}-{stop}", **place)

    assert told("whole", 1, None) == "finished"
    assert told("parted", 2, 1) == "stopped"
    assert not targets["parted"].exists()
    assert told("parted", 3, 3) == "stopped"
    assert told("parted", 1, None) == "finished"
    require_alike(targets["parted"], targets["whole"])
    assert not list(tmp_path.glob("*quantizing"))


def test_more_ranks_than_windows_are_refused(recipe: Path, tmp_path: Path) -> None:
    few = ["stages.quantized.ranks=3", "stages.quantized.calibration.tokens=128"]
    with pytest.raises(Exception, match=r"ranks: 3 are more than the 2 windows of 64 tokens"):
        run_recipe(recipe, tmp_path / "run", few)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stages.quantized.ranks=4"], "4 are more than a node has"),
        (
            ["stages.quantized.ranks=2", "stages.quantized.scheme=int8-weight"],
            "int8-weight is not calibrated; remove it",
        ),
    ],
)
def test_ranks_that_cannot_be_are_refused(recipe: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(recipe, overrides)
