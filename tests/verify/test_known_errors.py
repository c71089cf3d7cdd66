"""Silent errors that users of megatron-core have found: ours are right, or refused in a line.

Numbers are those of issues and pull requests of NVIDIA/Megatron-LM.
"""

from pathlib import Path
from typing import Any

import pytest

from llmscale.models.architecture import Architecture
from llmscale.parallel.layout import Layout
from llmscale.verify.proof import Proof
from llmscale.verify.verdict import Check
from tests.ranks import run_ranks
from tests.training.programs import step_of_one_token
from tests.verify.cases import proof, run_proofs

LLAMA: dict[str, Any] = {"family": "llama", "key_value_heads": 2}
MIXTRAL: dict[str, Any] = {"family": "mixtral", "experts": 4, "balance_coefficient": 1.0}

RIGHT: dict[str, Proof] = {
    "1754: a vocabulary that the tensor ranks do not divide": proof(
        LLAMA, parallel={"tensor": 2}, vocabulary=251
    ),
    "1736: one rank and two tensor ranks": proof(LLAMA, parallel={"tensor": 2}),
    "673, 906, 7452.9: masked losses of unequal counts over context ranks": proof(
        LLAMA, parallel={"context": 2, "data": 2}, separate_documents=True
    ),
    "5047, 2217: the balance loss over tensor and context ranks": proof(
        MIXTRAL, parallel={"tensor": 2, "sequence": True, "context": 2}
    ),
    "5916: the gradient norm of experts beside tensor ranks": proof(
        MIXTRAL,
        parallel={"tensor": 2, "sequence": True, "data": 2, "expert": 2},
        optimizer={"distributed": True, "gradient_clip": 0.1},
    ),
    "experts copied over tensor ranks, each with a part of the sequence": proof(
        MIXTRAL, parallel={"tensor": 2, "sequence": True}
    ),
    "1583: interleaved chunks, the last of them longer": proof(
        {**LLAMA, "layers": 5},
        parallel={"pipeline": 2, "virtual_pipeline": 2, "layers_per_stage": [1, 1, 1, 2]},
        micro_batches=4,
    ),
    "two interleaved stages whose messages go to the one neighbour": proof(
        LLAMA, parallel={"pipeline": 2, "virtual_pipeline": 2}, micro_batches=4
    ),
    "7227: a tied embedding counts once in the norm": proof(
        {"family": "gpt2"}, parallel={"pipeline": 2}, optimizer={"gradient_clip": 0.1}
    ),
    "optimizer state behind a padded bucket": proof(
        {"family": "bert"},
        parallel={"pipeline": 2, "data": 2},
        optimizer={"distributed": True},
        micro_batches=4,
    ),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Check]]:
    return run_proofs(RIGHT, tmp_path_factory.mktemp("known"))


@pytest.mark.ranks
@pytest.mark.parametrize("name", RIGHT)
def test_a_known_silent_error_is_none_here(name: str, found: dict[str, list[Check]]) -> None:
    assert [check for check in found[name] if not check.agrees] == []


@pytest.mark.ranks
def test_gradients_reduced_while_the_backward_pass_goes_on_are_the_same(tmp_path: Path) -> None:
    """What ``device: cuda`` does, made to happen on the CPU."""
    layouts: dict[str, dict[str, Any]] = {
        "data": {"data": 2},
        "interleaved": {"data": 2, "pipeline": 2, "virtual_pipeline": 2},
    }
    cases = {
        f"{name} {distributed}": proof(
            LLAMA, parallel=layout, optimizer={"distributed": distributed}, micro_batches=4
        )
        for name, layout in layouts.items()
        for distributed in (False, True)
    }
    plants = dict.fromkeys(cases, "gradients_reduced_early")
    for name, checks in run_proofs(cases, tmp_path, plants).items():
        assert [check for check in checks if not check.agrees] == [], name


@pytest.mark.ranks
def test_1764_a_context_rank_whose_tokens_are_all_masked_adds_nothing(tmp_path: Path) -> None:
    one, two = (
        run_ranks(step_of_one_token, ranks, tmp_path / str(ranks), layout={"context": ranks})
        for ranks in (1, 2)
    )
    assert one["tokens"] == two["tokens"] == 1
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-4)


def refusals(layers: int, **layout: Any) -> list[str]:
    architecture = Architecture(
        layers=layers, hidden_size=64, attention_heads=4, sequence_length=32
    )
    problems = architecture.layout_problems(Layout(**layout))
    return [f"{'.'.join(problem.path)}: {problem.message}" for problem in problems]


def test_468_eighty_layers_do_not_become_sixty_four() -> None:
    (line,) = refusals(80, pipeline=16, virtual_pipeline=2)
    assert line.startswith("virtual_pipeline: pipeline 16 x virtual_pipeline 2 = 32 stages do not")


def test_1304_thirty_layers_do_not_become_twenty_eight() -> None:
    (line,) = refusals(30, pipeline=4)
    assert line.startswith("pipeline: 4 pipeline stages do not divide 30 layers; use")


def test_1778_twenty_layers_do_not_become_one() -> None:
    (line,) = refusals(20, layers_per_stage=(1,))
    assert "sums to 1 layers, but the model has 20" in line
