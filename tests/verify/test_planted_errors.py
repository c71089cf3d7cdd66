"""A proof that cannot fail proves nothing: each planted error is found and told by its name."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llmscale.verify.proof import Proof
from llmscale.verify.verdict import Check
from tests.verify.cases import proof, run_proofs

LLAMA: dict[str, Any] = {"family": "llama", "key_value_heads": 2, "layers": 2}
GPT2 = {"family": "gpt2", "layers": 2}
MIXTRAL = {"family": "mixtral", "layers": 2, "experts": 4, "balance_coefficient": 0.1}


class Planted(NamedTuple):
    """A proof with an error in it, and which check tells of it, in which words."""

    proof: Proof
    check: str
    words: str


PLANTED = {
    "norms_not_reduced_over_the_tensor_group": Planted(
        proof(LLAMA, parallel={"tensor": 2, "sequence": True}),
        "gradients",
        "model.norm.weight, whole at tensor rank",
    ),
    "loss_averaged_over_ranks": Planted(
        proof(LLAMA, parallel={"data": 2}, separate_documents=True),
        "tokens counted",
        "from step 1 on",
    ),
    "last_layer_dropped": Planted(proof(LLAMA, parallel={"pipeline": 2}), "loss", "from step 1 on"),
    "positions_of_the_first_rank_everywhere": Planted(
        proof(LLAMA, parallel={"context": 2}), "loss", "from step 1 on"
    ),
    "mask_lost_in_packing": Planted(
        proof(LLAMA, parallel={"data": 2}, separate_documents=True), "loss", "from step 1 on"
    ),
    "tied_embedding_not_synchronized": Planted(
        proof(GPT2, parallel={"pipeline": 2}), "gradients", "transformer.wte.weight"
    ),
    "keys_of_other_ranks_get_no_gradient": Planted(
        proof(LLAMA, parallel={"context": 2}),
        "gradients",
        "model.layers.1.self_attn.q_proj.weight + model.layers.1.self_attn.k_proj.weight",
    ),
    "balance_loss_weighed_by_a_ranks_tokens": Planted(
        proof(MIXTRAL, parallel={"context": 2}),
        "gradients",
        "model.layers.1.block_sparse_moe.gate.weight",
    ),
    "experts_not_reduced": Planted(
        proof(MIXTRAL, parallel={"data": 2}),
        "gradients",
        "model.layers.1.block_sparse_moe.experts.",
    ),
    "heads_of_the_first_rank_everywhere": Planted(
        proof(LLAMA, parallel={"tensor": 2}), "loss", "from step 1 on"
    ),
    "vocabulary_of_other_ranks_forgotten": Planted(
        proof(LLAMA, parallel={"tensor": 2}), "loss", "from step 1 on"
    ),
    "shared_embedding_counted_twice": Planted(
        proof(GPT2, parallel={"pipeline": 2}), "gradient norm", "from step 1 on"
    ),
    "one_rank_at_another_learning_rate": Planted(
        proof(LLAMA, parallel={"data": 2}), "parameters", "data rank 1 (rank 1)"
    ),
    "one_replica_keeps_its_own_gradient": Planted(
        proof(LLAMA, parallel={"data": 2}),
        "gradients",
        "from step 1 on: model.layers.1.mlp.down_proj.weight, whole at tensor rank 0, "
        "pipeline rank 0, context rank 0, expert rank 0, data rank 1 (rank 1)",
    ),
    "moments_lost_in_the_checkpoint": Planted(
        proof(LLAMA, parallel={"data": 2}), "checkpoint at one rank", "from step 3 on"
    ),
    "gate_and_up_swapped_in_the_export": Planted(
        proof(LLAMA, parallel={"tensor": 2}), "Hugging Face export", "mlp.up_proj.weight"
    ),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Check]]:
    folder: Path = tmp_path_factory.mktemp("planted")
    cases = {name: planted.proof for name, planted in PLANTED.items()}
    return run_proofs(cases, folder, plants={name: name for name in PLANTED})


@pytest.mark.ranks
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_told_by_its_name(name: str, found: dict[str, list[Check]]) -> None:
    planted = PLANTED[name]
    told = {check.name: check.where for check in found[name] if not check.agrees}
    assert planted.check in told, found[name]
    assert planted.words in told[planted.check]


@pytest.mark.ranks
def test_an_error_after_the_loss_leaves_the_first_loss_equal(
    found: dict[str, list[Check]],
) -> None:
    later = [name for name, one in PLANTED.items() if one.check not in ("loss", "tokens counted")]
    for name in later:
        tokens, loss, *_ = found[name]
        assert (tokens.name, loss.name) == ("tokens counted", "loss")
        assert tokens.agrees, name
        assert loss.step != 1, name
