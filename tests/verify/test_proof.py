"""A recipe's stage scaled down keeps its structure, fits its ranks, and can be built."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.models.architecture import Architecture
from llmscale.parallel.layout import Layout
from llmscale.stages.pretrain import Pretrain
from llmscale.verify.proof import Proof, proofs

MODELS: list[dict[str, Any]] = [
    {"family": "llama", "attention_heads": 32, "key_value_heads": 8},
    {"family": "llama", "attention_heads": 16, "key_value_heads": 16, "head_size": 96},
    {"family": "qwen3", "attention_heads": 16, "key_value_heads": 8, "head_size": 128},
    {"family": "gpt2", "attention_heads": 16},
    {"family": "bert", "attention_heads": 16},
    {"family": "t5", "attention_heads": 16, "decoder_layers": 32},
    {"family": "mixtral", "attention_heads": 16, "experts": 8},
]
DEGREE = st.sampled_from([1, 2, 4])


@st.composite
def stages(draw: st.DrawFn) -> tuple[Pretrain, int]:
    """A valid pretraining stage at a layout of its own, and its number of ranks."""
    tensor, pipeline, context, data = (draw(DEGREE) for _ in range(4))
    model = draw(st.sampled_from(MODELS))
    moe = model["family"] == "mixtral"
    virtual = draw(st.sampled_from([1, 2, 4])) if pipeline > 1 else 1
    total = 64 if model["family"] == "t5" else 32
    uneven = [1] + [2] * (pipeline - 2) + [total - 1 - 2 * (pipeline - 2)]
    stage = Pretrain(
        kind="pretrain",
        corpus="corpus",
        tokenizer="tokenizer",
        model=Architecture(
            layers=32, hidden_size=1024, sequence_length=2048, ffn_size=4096, **model
        ),
        parallel=Layout(
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            data=data,
            expert=min(8, tensor * context * data) if moe else 1,
            virtual_pipeline=virtual,
            sequence=tensor > 1 and (moe or draw(st.booleans())),
            layers_per_stage=(
                tuple(uneven) if virtual == 1 and pipeline > 1 and draw(st.booleans()) else None
            ),
        ),
        batch={"global": 512, "micro": draw(st.sampled_from([1, 2, 4]))},
        optimizer={"learning_rate": 1e-4, "distributed": draw(st.booleans())},
        recompute=draw(st.sampled_from(["none", "full", "selective"])),
        steps=10,
    )
    return stage, tensor * pipeline * context * data


def problems(proof: Proof) -> list[Any]:
    layout = proof.parallel
    batch = proof.batch.problems(
        data_ranks=layout.data_ranks(proof.ranks),
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
    )
    return [
        *proof.model.problems(),
        *proof.model.layout_problems(layout),
        *layout.problems(ranks=proof.ranks),
        *batch,
    ]


@settings(max_examples=200, deadline=None)
@given(stages(), st.sampled_from([8, 16]))
def test_a_proof_is_a_valid_recipe_with_the_same_structure(
    given_stage: tuple[Pretrain, int], most: int
) -> None:
    stage, ranks = given_stage
    found = proofs(stage, ranks, steps=3, most_ranks=most)
    layout = stage.parallel
    degrees = ("tensor", "pipeline", "context", "data")
    split = {name for name in degrees if (getattr(layout, name) or 1) > 1}
    proven = {
        frozenset(name for name in split if getattr(one.parallel, name) == 2) for one in found
    }
    most_degrees = min(len(split), most.bit_length() - 1)
    assert {len(names) for names in proven} == {most_degrees}
    assert frozenset().union(*proven) == split
    for one in found:
        assert not problems(one)
        assert one.ranks <= most
        model, small = stage.architecture(), one.model
        assert small.family == model.family
        assert small.tied == model.tied
        assert (small.groups == small.attention_heads) == (model.groups == model.attention_heads)
        own_heads = model.head * model.attention_heads != model.hidden_size
        assert (small.head * small.attention_heads != small.hidden_size) == own_heads
        assert bool(small.experts) == bool(model.experts)
        assert one.optimizer.distributed == stage.optimizer.distributed
        assert one.recompute == stage.recompute
        if one.parallel.tensor > 1:
            assert one.parallel.sequence == layout.sequence
        if one.parallel.pipeline > 1:
            assert (one.parallel.virtual_pipeline > 1) == (layout.virtual_pipeline > 1)
            assert bool(one.parallel.layers_per_stage) == bool(layout.layers_per_stage)


def test_four_degrees_on_eight_ranks_are_proven_three_at_a_time() -> None:
    stage = Pretrain(
        kind="pretrain",
        corpus="c",
        tokenizer="t",
        model=Architecture(layers=8, hidden_size=64, attention_heads=4, sequence_length=64),
        parallel=Layout(tensor=4, pipeline=2, context=2, data=8),
        batch={"global": 64},
        optimizer={"learning_rate": 1e-4},
        steps=1,
    )
    assert [one.ranks for one in proofs(stage, 128, steps=1, most_ranks=8)] == [8] * 4
    assert [one.ranks for one in proofs(stage, 128, steps=1, most_ranks=16)] == [16]


def test_experts_that_two_ranks_do_not_divide_become_some_that_they_do() -> None:
    stage = Pretrain(
        kind="pretrain",
        corpus="c",
        tokenizer="t",
        model=Architecture(
            family="mixtral",
            experts=3,
            layers=2,
            hidden_size=64,
            attention_heads=4,
            sequence_length=64,
        ),
        parallel=Layout(data=3, expert=3),
        batch={"global": 6},
        optimizer={"learning_rate": 1e-4},
        steps=1,
    )
    (one,) = proofs(stage, 3, steps=1, most_ranks=8)
    assert not problems(one)
