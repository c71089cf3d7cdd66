"""A wrong stage of fine-tuning is answered with one line, before anything starts."""

from typing import Any

import pytest

from tests.recipe.conftest import RECIPES

GOOD = {
    "kind": "finetune",
    "start_from": "pretrain",
    "data": f"{{own: {{path: {RECIPES}/quickstart.yaml}}}}",
    "batch": "{global: 8, micro: 1}",
    "optimizer": "{learning_rate: 1.0e-3}",
    "steps": "10",
}
WRONG: dict[str, tuple[dict[str, str], str]] = {
    "a model that is not there": (
        {"start_from": "pretrian"},
        ".start_from: 'pretrian' is no stage of this recipe, and no folder; use pretrain",
    ),
    "a stage that trains no model": (
        {"start_from": "corpus"},
        ".start_from: 'corpus' is a stage of kind prepare; use pretrain",
    ),
    "a folder without a model": (
        {"start_from": f"{RECIPES}/texts"},
        ".start_from: 'RECIPES/texts' is a folder without config.json; use pretrain",
    ),
    "data that are not there": (
        {"data": "{own: {path: nothing*.jsonl}}"},
        ".data.own.path: no file matches nothing*.jsonl; give the path of a file of "
        "records, from the recipe's folder on",
    ),
    "no data": ({"data": "{}"}, ".data: is empty; give at least one"),
    "steps and epochs": (
        {"epochs": "2"},
        ": give either steps or epochs, not both; both are given",
    ),
    "neither": ({"steps": "null"}, ": give either steps or epochs, not both; neither is given"),
    "a template nobody knows": (
        {"template": "chatlm"},
        ".template: 'chatlm' is no choice; use chatml, alpaca or plain",
    ),
    "a sequence the model has no positions for": (
        {"sequence_length": "4096"},
        ".sequence_length: 4096 is above the model's 128; use at most 128",
    ),
    "a layout that does not divide the heads": (
        {"parallel": "{tensor: 3, data: 1}"},
        ".parallel.tensor: 3 does not divide 8 attention heads; use 1, 2 or 4",
    ),
    "fp8 on the cpu": (
        {"precision": "fp8"},
        ".precision: fp8 needs a GPU, but cluster.device is cpu; use bf16",
    ),
    "a name that is no folder's": (
        {"data": f"{{a/b: {{path: {RECIPES}/quickstart.yaml}}}}"},
        ".data.a/b: 'a/b' is no name; use letters, digits, - and _, at most 100 of them, a letter "
        "or digit first",
    ),
    "nothing to stop early by": (
        {"early_stopping": "{patience: 2}", "validation_fraction": "0.0"},
        ".early_stopping: looks at the validation loss, and validation_fraction is 0; raise that, "
        "or remove it",
    ),
    "an adapter of no rank": (
        {"adapter": "{rank: 0}"},
        ".adapter.rank: 0 is too small; use a number above 0",
    ),
    "four bits on megatron": (
        {"adapter": "{method: qlora}"},
        ".adapter.method: engine megatron has no qlora; use lora, or engine: deepspeed",
    ),
    "four bits split": (
        {
            "engine": "deepspeed",
            "parallel": "{}",
            "zero": "{stage: 3}",
            "adapter": "{method: qlora}",
        },
        ".adapter.method: zero.stage 3 splits no weights of four bits; use 2, or lora",
    ),
    "virtual tokens under ZeRO 3": (
        {
            "engine": "deepspeed",
            "parallel": "{}",
            "zero": "{stage: 3}",
            "adapter": "{method: prompt}",
            "sequence_length": "64",
        },
        ".adapter.method: prompt does not work under zero.stage 3 here; use 2, or lora",
    ),
    "a number of another method": (
        {"engine": "deepspeed", "parallel": "{}", "adapter": "{method: ia3, rank: 4}"},
        ".adapter.rank: method ia3 has none; remove it",
    ),
    "bottleneck adapters": (
        {"adapter": "{method: adapters}"},
        ".adapter.method: 'adapters' is no choice; use lora, qlora, ia3, prefix or prompt",
    ),
    "virtual tokens beyond the model's positions": (
        {"engine": "deepspeed", "parallel": "{}", "adapter": "{method: prefix}"},
        ".sequence_length: 128 and 20 virtual tokens are above the model's 128; use at most 108",
    ),
    "virtual tokens before packed examples": (
        {
            "engine": "deepspeed",
            "parallel": "{}",
            "adapter": "{method: prompt}",
            "sequence_length": "64",
            "packing": "true",
        },
        ".packing: virtual tokens stand before a sample, not before each example in it; remove it",
    ),
    "a prefix computed again": (
        {
            "engine": "deepspeed",
            "parallel": "{}",
            "adapter": "{method: prefix}",
            "sequence_length": "64",
            "recompute": "full",
        },
        ".recompute: a prefix's keys and values are not computed again; remove it",
    ),
    "ZeRO on megatron": (
        {"zero": "{stage: 2}"},
        ".zero: engine megatron has no ZeRO; set engine: deepspeed, or remove it",
    ),
    "tensor ranks on deepspeed": (
        {"engine": "deepspeed", "parallel": "{tensor: 2}"},
        ".parallel.tensor: engine deepspeed splits a model by zero alone; remove it, or use "
        "engine megatron",
    ),
    "weights to the host that are not split": (
        {"engine": "deepspeed", "parallel": "{}", "zero": "{stage: 1, offload: weights}"},
        ".zero.offload: stage 1 splits no weights; use stage 3",
    ),
    "weights that hardly repeat": (
        {
            "data": f"{{a: {{path: {RECIPES}/quickstart.yaml, weight: 0.1234567}}, "
            f"b: {{path: {RECIPES}/quickstart.yaml}}}}"
        },
        ".data: the weights repeat after more than 100000 samples; round them to fewer digits",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_stage_is_answered_with_place_key_cause_and_mend(
    quickstart: str, says: Any, name: str
) -> None:
    changes, line = WRONG[name]
    written = ", ".join(f"{key}: {value}" for key, value in {**GOOD, **changes}.items())
    said = says(quickstart, [f"stages.tuned={{{written}}}"])
    assert said.endswith(f": stages.tuned{line}")


def test_fp8_beside_an_adapter_is_answered_with_its_mend(quickstart: str, says: Any) -> None:
    stage = {**GOOD, "precision": "fp8", "adapter": "{rank: 4}"}
    written = ", ".join(f"{key}: {value}" for key, value in stage.items())
    said = says(quickstart, ["cluster.device=cuda", f"stages.tuned={{{written}}}"])
    assert said.endswith(
        ": stages.tuned.precision: fp8 needs layers of Transformer Engine, beside which engine "
        "megatron has no adapter; use bf16"
    )


def test_a_stage_that_would_lose_virtual_tokens_is_answered_with_its_mend(
    quickstart: str, says: Any
) -> None:
    virtual = {
        "engine": "deepspeed",
        "parallel": "{}",
        "adapter": "{method: prompt}",
        "sequence_length": "64",
    }
    prompted, after = (
        ", ".join(f"{key}: {value}" for key, value in stage.items())
        for stage in ({**GOOD, **virtual}, {**GOOD, "start_from": "prompted"})
    )
    said = says(quickstart, [f"stages.prompted={{{prompted}}}", f"stages.after={{{after}}}"])
    assert said.endswith(
        ": stages.after.start_from: prompted trains virtual tokens, which are no part of its "
        "weights and would be lost; use what it starts from itself"
    )


def test_four_bits_of_gpt2_are_answered_with_their_mend(quickstart: str, says: Any) -> None:
    changes = {"engine": "deepspeed", "parallel": "{}", "adapter": "{method: qlora}"}
    written = ", ".join(f"{key}: {value}" for key, value in {**GOOD, **changes}.items())
    gpt2 = "{family: gpt2, layers: 2, hidden_size: 64, attention_heads: 8, sequence_length: 128}"
    overrides = [f"stages.pretrain.model={gpt2}", f"stages.tuned={{{written}}}"]
    assert says(quickstart, overrides).endswith(
        ": stages.tuned.adapter.method: gpt2 has no linear layers that can be quantized here; "
        "use lora"
    )
