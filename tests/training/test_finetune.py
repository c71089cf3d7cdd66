"""Fine-tuning equals a plain loop over single examples, at any layout, padded or packed."""

import copy
import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from llmscale.artifacts import RunFolder
from llmscale.data.chat import Example, prompt_text
from llmscale.data.conversations import Turn
from llmscale.data.templates import TEMPLATES
from llmscale.errors import RecipeError, StageError
from llmscale.evaluate_command import Measures, Texts, evaluate
from llmscale.evaluation.models import load_model
from llmscale.models.huggingface_config import read_architecture
from llmscale.models_at_hand import export, generate_text, import_model
from llmscale.progress import Progress
from llmscale.quantization.grids import find_grid
from llmscale.quantization.quantize import quantize
from llmscale.quantization.schemes import INT4, INT8, QuantizationAware
from llmscale.recipe.recipe import load_recipe
from llmscale.stages.base import Workspace
from llmscale.stages.finetune import Finetune
from llmscale.training.adapters import keep_four_bits_as_stored, with_adapter
from llmscale.training.settings import Adapter
from tests.models_on_disk import WORDS, small_llama
from tests.ranks import cut_off_after, run_recipe

STEPS, LEARNING_RATE, CLIP = 4, 3e-3, 0.5
RECIPE = """
name: tuned
seed: 7
cluster: {on: local, device: cpu}
stages:
  assistant:
    kind: finetune
    start_from: base
    data:
      sums: {path: sums.jsonl, weight: 2}
      chats: {path: chats.json}
    template: chatml
    validation_fraction: 0.2
    batch: {global: 8, micro: 2}
    optimizer: {learning_rate: 3.0e-3, schedule: constant, gradient_clip: 0.5, epsilon: 1.0e-5}
    steps: 4
    checkpoint: {every: 2}
"""
WAYS: dict[str, list[str]] = {
    "one rank": [],
    "tensor 2": ["stages.assistant.parallel={tensor: 2, sequence: true}"],
    "data 2": ["stages.assistant.parallel={data: 2}"],
    "tensor 2, pipeline 2": ["stages.assistant.parallel={tensor: 2, pipeline: 2}"],
    "packed": [],
    "pipeline 2, packed": ["stages.assistant.parallel={pipeline: 2}"],
    "context 2, packed": ["stages.assistant.parallel={context: 2}"],
    "ZeRO 0": ["stages.assistant.zero={stage: 0}"],
    "ZeRO 1 on 2 ranks": ["stages.assistant.zero={stage: 1}"],
    "ZeRO 2 on 2 ranks, packed": ["stages.assistant.zero={stage: 2}"],
    "ZeRO 3 on 2 ranks": ["stages.assistant.zero={stage: 3}"],
}
LORA = "LoRA, ZeRO 2 on 2 ranks, packed"
SHORTER = "stages.assistant.sequence_length=60"
LOW_RANK = "rank: 4, alpha: 8, targets: [q_proj, v_proj, down_proj]"
METHODS = {
    "LoRA": [f"stages.assistant.adapter={{method: lora, {LOW_RANK}}}"],
    "QLoRA": [f"stages.assistant.adapter={{method: qlora, {LOW_RANK}}}"],
    "IA3": ["stages.assistant.adapter={method: ia3}"],
    "prefix": ["stages.assistant.adapter={method: prefix, virtual_tokens: 4}", SHORTER],
    "rounded to 4 bits": [
        "stages.assistant.quantization_aware={scheme: int4-weight, group_size: 16}"
    ],
    "rounded to 8 bits": ["stages.assistant.quantization_aware={scheme: int8-weight}"],
    "prompt": ["stages.assistant.adapter={method: prompt, virtual_tokens: 4}", SHORTER],
}
LORA_WAYS: dict[str, list[str]] = {
    "distributed data 2": ["stages.assistant.optimizer.distributed=true"],
    "distributed tensor 2": [
        "stages.assistant.parallel={tensor: 2, sequence: true}",
        "stages.assistant.optimizer.distributed=true",
    ],
    "tensor 2": WAYS["tensor 2"],
    "tensor 2, pipeline 2, recompute": [
        "stages.assistant.parallel={tensor: 2, pipeline: 2, sequence: true}",
        "stages.assistant.recompute=full",
    ],
    "context 2, packed": WAYS["context 2, packed"],
    "ZeRO 0": WAYS["ZeRO 0"],
    "ZeRO 2 on 2 ranks, packed": WAYS["ZeRO 2 on 2 ranks, packed"],
    "ZeRO 3 on 2 ranks": WAYS["ZeRO 3 on 2 ranks"],
}


def way(name: str) -> list[str]:
    """The overrides of a way to train."""
    ranks = 2 if " 2" in name and "ZeRO 2 on" not in name else 1
    ranks = 4 if "tensor 2, pipeline 2" in name else 2 if "2 ranks" in name else ranks
    engine = ["stages.assistant.engine=deepspeed"] if "ZeRO" in name else []
    packed = ["stages.assistant.packing=true"] if "packed" in name else []
    method, _, rest = name.partition(", ")
    own = [*(WAYS | LORA_WAYS)[rest if method in METHODS else name], *METHODS.get(method, [])]
    return [f"cluster.ranks_per_node={ranks}", *engine, *packed, *own]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its model and its data."""
    folder = tmp_path_factory.mktemp("home")
    small_llama(folder / "base")
    (folder / "recipe.yaml").write_text(RECIPE)
    words, lot = WORDS.split(), random.Random(0)

    def said(most: int) -> str:
        return " ".join(lot.choices(words, k=lot.randint(1, most)))

    sums = [{"instruction": said(4), "input": said(2), "output": said(3)} for _ in range(30)]
    chats = [
        {
            "messages": [
                {"role": role, "content": said(2)}
                for _ in range(lot.randint(1, 2))
                for role in ("user", "assistant")
            ]
        }
        for _ in range(20)
    ]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    (folder / "chats.json").write_text(json.dumps(chats, indent=1))
    return folder


WholeRun = Callable[[str], RunFolder]


@pytest.fixture(scope="module")
def whole_run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """Uninterrupted runs of all steps, each way's made once."""
    folder = tmp_path_factory.mktemp("whole")
    made: dict[str, RunFolder] = {}

    def run(name: str) -> RunFolder:
        if name not in made:
            made[name] = tuned(home, folder / str(len(made)), *way(name))
        return made[name]

    return run


def tuned(home: Path, run: Path, *overrides: str) -> RunFolder:
    return run_recipe(home / "recipe.yaml", run, list(overrides))


def steps_of(home: Path, run: RunFolder, *overrides: str) -> list[list[Example]]:
    """The examples of each step, in the stage's own order."""
    from llmscale.stages.examples import fine_tuning

    recipe = load_recipe(home / "recipe.yaml", overrides)
    stage, folder = recipe.stages["assistant"], run.stage("assistant")
    assert isinstance(stage, Finetune)
    inputs = {"start_from": home / "base"}
    workspace = Workspace(folder, inputs, recipe.seed, "cpu", Progress(folder.progress_file))
    samples: Any = fine_tuning(stage, workspace).data.phases[0]
    steps = []
    for step in range(STEPS):
        found = [samples._blended.find(place) for place in range(8 * step, 8 * step + 8)]
        steps.append([example for source, number in found for example in source.sample(number)])
    return steps


Curve = list[tuple[float, float]]


def trained_alone(
    logits: Callable[[torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    steps: list[list[Example]],
) -> Curve:
    """Loss and gradient norm of each step, every example in a pass of its own.

    Args:
        logits: of a model, for tokens ``[1, n]``: ``[1, n, v]``.
    """
    leaves = [leaf for group in optimizer.param_groups for leaf in group["params"]]
    curve = []
    for examples in steps:
        optimizer.zero_grad()
        total, count = torch.zeros(()), sum(int(e.learned_n.sum()) for e in examples)
        for example in examples:
            tokens = torch.from_numpy(example.tokens_n).long()
            labels = torch.where(torch.from_numpy(example.learned_n), tokens, -100)[1:]
            predicted = logits(tokens[None])[0, :-1]
            loss = cross_entropy(predicted, labels, reduction="sum") / count
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(leaves, CLIP)
        optimizer.step()
        curve.append((float(total), float(norm)))
    return curve


def plain_loop(base: Path, steps: list[list[Example]]) -> tuple[Curve, Any]:
    """The curve of a model that is trained whole; and the model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, (0.9, 0.95), 1e-5)
    return trained_alone(lambda tokens: model(tokens).logits, optimizer, steps), model


def logged(run: RunFolder) -> list[tuple[float, float]]:
    return [
        (line["loss"], line["gradient_norm"])
        for line in run.stage("assistant").metrics()
        if "loss" in line
    ]


@pytest.mark.ranks
@pytest.mark.parametrize("name", WAYS)
def test_every_engine_and_layout_equals_a_loop_over_single_examples(
    name: str, home: Path, whole_run: WholeRun
) -> None:
    run = whole_run(name)
    steps = steps_of(home, run, *way(name))
    assert ("packed" in name) == (sum(map(len, steps)) > 8 * STEPS)
    expected, model = plain_loop(home / "base", steps)
    for (loss, norm), (true_loss, true_norm) in zip(logged(run), expected, strict=True):
        assert loss == pytest.approx(true_loss, rel=1e-5)
        assert norm == pytest.approx(true_norm, rel=1e-4)
    assert run.stage("assistant").manifest()["metrics"]["best_step"] == STEPS
    written = AutoModelForCausalLM.from_pretrained(run.stage("assistant").hf)
    for parameter_name, parameter in model.named_parameters():
        difference = (written.get_parameter(parameter_name) - parameter).abs().max()
        assert difference <= 1e-5, parameter_name


def test_the_model_answers_in_the_template_it_was_taught(home: Path, tmp_path: Path) -> None:
    learning = ["stages.assistant.steps=60", "stages.assistant.data={same: {path: same.jsonl}}"]
    same = {"prompt": "what is up?", "response": "the sea"}
    (home / "same.jsonl").write_text("\n".join([json.dumps(same)] * 20))
    run = tuned(home, tmp_path / "run", *learning, "stages.assistant.validation_fraction=0.0")
    model, greedy = str(run.stage("assistant").hf), {"decoding": "greedy", "max_new_tokens": 20}
    assert generate_text(model, "what is up?", greedy, 0, raw=False) == ("the sea", True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = [{"role": "user", "content": "what is up?"}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert prompt == prompt_text((Turn("user", "what is up?"),), tokenizer, TEMPLATES["chatml"])
    text, answered = generate_text(model, prompt, greedy, 0, raw=True)
    assert not answered and text.startswith("the sea")


def test_training_that_brings_nothing_better_ends_early(home: Path, tmp_path: Path) -> None:
    harmful = [
        "stages.assistant.optimizer.learning_rate=0.3",
        "stages.assistant.steps=40",
        "stages.assistant.early_stopping={patience: 2}",
    ]
    run = tuned(home, tmp_path / "run", *harmful)
    lines = run.stage("assistant").metrics()
    losses = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert losses.pop(0) == pytest.approx(6.7, abs=0.5)  # random weights know nothing
    metrics = run.stage("assistant").manifest()["metrics"]
    assert metrics["steps"] < 40
    assert metrics["best_step"] == min(losses, key=lambda step: losses[step])
    assert metrics["steps"] == metrics["best_step"] + 4
    shutil.rmtree(run.stage("assistant").hf)
    run.stage("assistant").update_manifest(status="interrupted")
    again = tuned(home, run.path, *harmful)
    assert again.stage("assistant").metrics() == lines


def test_epochs_are_steps_over_all_samples(home: Path, tmp_path: Path) -> None:
    without_steps = ["stages.assistant.steps=", "stages.assistant.epochs=1.5"]
    run = tuned(home, tmp_path / "run", *without_steps)
    metrics = run.stage("assistant").manifest()["metrics"]
    examples = sum(counts["train"] for counts in metrics["examples"].values())
    assert metrics["steps"] == -(-(examples * 3 // 2) // 8)


def test_few_examples_of_each_class_are_chosen_by_the_seed(home: Path, tmp_path: Path) -> None:
    records = [
        {"prompt": f"one and {n}", "response": "add", "kind": "sum" if n % 3 else "other"}
        for n in range(30)
    ]
    (home / "classes.jsonl").write_text("\n".join(map(json.dumps, records)))
    few = "{path: classes.jsonl, few: {examples: 4, class_key: kind}}"
    chosen = []
    for seed in (1, 1, 2):
        run = tmp_path / str(len(chosen))
        overrides = [f"seed={seed}", f"stages.assistant.data={{classes: {few}}}"]
        run_recipe(home / "recipe.yaml", run, overrides, ["assistant.examples"])
        folder = run / "assistant" / "examples" / "classes"
        chosen.append([(folder / f"{s}.safetensors").read_bytes() for s in ("train", "validation")])
        counts = RunFolder(run).stage("assistant").manifest()["metrics"]["examples"]["classes"]
        assert counts["train"] == 8
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_checkpoint_exports_on_request_what_the_stage_does(
    whole_run: WholeRun, tmp_path: Path
) -> None:
    run = whole_run("one rank")
    export(f"{run.path}:assistant", tmp_path / "out")
    own = load_file(run.stage("assistant").hf / "model.safetensors")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(own[name], exported[name]) for name in own)
    template = (run.stage("assistant").hf / "chat_template.jinja").read_text()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("tensor 2", "tensor 2"),
        ("ZeRO 2 on 2 ranks, packed", "ZeRO 2 on 2 ranks, packed"),
        ("ZeRO 3 on 2 ranks", "ZeRO 3 on 2 ranks"),
        (LORA, LORA),
        ("QLoRA, ZeRO 2 on 2 ranks, packed", "QLoRA, ZeRO 2 on 2 ranks, packed"),
        ("IA3, ZeRO 3 on 2 ranks", "IA3, ZeRO 3 on 2 ranks"),
        ("prefix, ZeRO 1 on 2 ranks", "prefix, ZeRO 1 on 2 ranks"),
        ("prompt, ZeRO 1 on 2 ranks", "prompt, ZeRO 1 on 2 ranks"),
        ("LoRA, tensor 2", "LoRA, tensor 2"),
        ("LoRA, distributed data 2", "LoRA, distributed tensor 2"),
        ("ZeRO 3 on 2 ranks", "ZeRO 0"),
        ("ZeRO 0", "ZeRO 1 on 2 ranks"),
    ],
)
def test_a_run_cut_off_in_the_middle_goes_on_to_the_same_curve(
    first: str, then: str, home: Path, tmp_path: Path, whole_run: WholeRun
) -> None:
    whole = whole_run(first)
    run = RunFolder(Path(shutil.copytree(whole.path, tmp_path / "run")))
    cut_off_after(run.stage("assistant"), STEPS // 2)
    tuned(home, run.path, *way(then))
    assert not (run.path / "superseded").exists()
    if first == then:
        assert logged(run) == logged(whole)
        ours, expected = weights(run), weights(whole)
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
        return
    for (loss, norm), (true_loss, true_norm) in zip(logged(run), logged(whole), strict=True):
        assert loss == pytest.approx(true_loss, rel=1e-5)
        assert norm == pytest.approx(true_norm, rel=1e-4)


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    files = run.stage("assistant").hf.glob("model*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def adapted_loop(
    base: Path, steps: list[list[Example]], seed: int, quantized: bool
) -> tuple[Curve, dict[str, torch.Tensor]]:
    """The curve of weights W + 2 B A of which A and B are trained; the final ones by name.

    Args:
        quantized: whether W is what is left of the folder's weights after NF4.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    frozen = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if quantized:
        frozen |= {name: nf4(weight) for name, weight in frozen.items() if "_proj." in name}
    peft_model = with_adapter(copy.deepcopy(model), ADAPTER, seed)
    drawn = {name.split("base_model.model.")[1]: p for name, p in peft_model.named_parameters()}
    factors = {}
    for name in frozen:
        key = name.removesuffix("weight")
        if f"{key}lora_A.default.weight" in drawn:
            down = drawn[f"{key}lora_A.default.weight"].detach().clone().requires_grad_()
            factors[name] = (torch.zeros(len(frozen[name]), 4, requires_grad=True), down)

    def merged() -> dict[str, torch.Tensor]:
        return {
            name: weight + 2 * factors[name][0] @ factors[name][1] if name in factors else weight
            for name, weight in frozen.items()
        }

    leaves = [factor for pair in factors.values() for factor in pair]
    optimizer = torch.optim.AdamW(leaves, LEARNING_RATE, (0.9, 0.95), 1e-5, weight_decay=0.1)
    curve = trained_alone(
        lambda tokens: functional_call(model, merged(), (tokens,)).logits, optimizer, steps
    )
    return curve, {name: weight.detach() for name, weight in merged().items()}


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """A weight put into four bits, its scales into eight, and back."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(*packed)


def rounded_loop(
    base: Path, steps: list[list[Example]], scheme: str
) -> tuple[Curve, dict[str, torch.Tensor]]:
    """The curve of weights w that compute as w + (rounded(w) - w), of which the second is given."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    form, group = (INT4, 16) if scheme == "int4-weight" else (INT8, None)
    form = dataclasses.replace(form, observer="minmax")
    linear = {name for name, _ in model.named_parameters() if "_proj." in name}

    def used() -> dict[str, torch.Tensor]:
        found = {}
        for name in linear:
            weight = model.get_parameter(name)
            plain = weight.detach()
            grid = find_grid(plain, form, group, torch.bfloat16)
            found[name] = weight + (grid.rounded(plain) - plain)
        return found

    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, (0.9, 0.95), 1e-5)
    curve = trained_alone(
        lambda tokens: functional_call(model, used(), (tokens,)).logits, optimizer, steps
    )
    return curve, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.ranks
@pytest.mark.parametrize(
    "name",
    [
        "rounded to 4 bits, one rank",
        "rounded to 4 bits, distributed tensor 2",
        "rounded to 4 bits, tensor 2, pipeline 2, recompute",
        "rounded to 4 bits, data 2",
        "rounded to 8 bits, tensor 2",
        "rounded to 4 bits, ZeRO 0",
        "rounded to 8 bits, ZeRO 2 on 2 ranks, packed",
    ],
)
def test_rounded_weights_compute_and_whole_ones_learn(
    name: str, home: Path, whole_run: WholeRun
) -> None:
    run = whole_run(name)
    steps = steps_of(home, run, *way(name))
    scheme = "int4-weight" if "4 bits" in name else "int8-weight"
    expected, learned = rounded_loop(home / "base", steps, scheme)
    for (loss, norm), (true_loss, true_norm) in zip(logged(run), expected, strict=True):
        assert loss == pytest.approx(true_loss, rel=1e-5)
        assert norm == pytest.approx(true_norm, rel=1e-4)
    written = weights(run)
    for parameter, whole in learned.items():
        assert (written[parameter] - whole).abs().max() <= 1e-5, parameter


def test_quantizing_leaves_the_weights_that_were_learned_with(
    whole_run: WholeRun, tmp_path: Path
) -> None:
    folder = whole_run("rounded to 4 bits, one rank").stage("assistant").hf
    settings = QuantizationAware(scheme="int4-weight", group_size=16).quantization()
    quantize(folder, tmp_path / "out", settings, None, tokens=0)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    learned = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    form = dataclasses.replace(INT4, observer="minmax")
    for name, weight in learned.named_parameters():
        plain, rounded = weight.detach(), weight.detach().bfloat16().float()
        if "_proj." in name:
            rounded = find_grid(plain, form, 16, torch.bfloat16).rounded(plain)
        weight.data.copy_(rounded)
    tokens = torch.arange(5, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(stored(tokens).logits, learned(tokens).logits)


@pytest.mark.parametrize(
    ("overrides", "place", "told"),
    [
        (["scheme: int4-weight"], "group_size", "does not divide 48 inputs of a layer; use 8 or"),
        (
            ["scheme: int8-weight, group_size: 16"],
            "group_size",
            "is of groups; remove it, or use scheme int4-weight",
        ),
        (["scheme: int8-weight", METHODS["LoRA"][0]], "", "an adapter's model is not rounded"),
        (
            [
                "scheme: int8-weight",
                "stages.assistant.engine=deepspeed",
                "stages.assistant.zero={stage: 3}",
            ],
            "",
            "rounding needs whole rows; use zero.stage 0 to 2, or engine megatron",
        ),
    ],
)
def test_what_cannot_be_rounded_is_refused_in_one_line(
    overrides: list[str], place: str, told: str, home: Path
) -> None:
    first, *others = overrides
    aware = f"stages.assistant.quantization_aware={{{first}}}"
    with pytest.raises(RecipeError) as refused:
        load_recipe(home / "recipe.yaml", [aware, *others])
    where = "stages.assistant.quantization_aware" + (f".{place}" if place else "")
    assert f"{where}: " in str(refused.value)
    assert told in str(refused.value)


def test_a_stage_that_quantizes_otherwise_than_was_learned_is_told_so(home: Path) -> None:
    aware = "stages.assistant.quantization_aware={scheme: int4-weight, group_size: 16}"
    stage = "stages.small={{kind: quantize, model: assistant, scheme: int4-weight, {}}}"
    load_recipe(home / "recipe.yaml", [aware, stage.format("group_size: 16, observer: minmax")])
    for given, told in (
        ("group_size: 16", "observer: assistant was trained for minmax; use that"),
        ("group_size: 8, observer: minmax", "group_size: assistant was trained for 16; use that"),
        ("symmetric: false, group_size: 16", "symmetric: assistant was trained for true; use that"),
    ):
        with pytest.raises(RecipeError) as refused:
            load_recipe(home / "recipe.yaml", [aware, stage.format(given)])
        assert told in str(refused.value)


ADAPTER = Adapter(rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"))


@pytest.mark.ranks
@pytest.mark.parametrize("name", [*LORA_WAYS, "QLoRA, ZeRO 2 on 2 ranks, packed"])
def test_an_adapter_learns_as_its_formula_does(name: str, home: Path, whole_run: WholeRun) -> None:
    quantized, name = name.startswith("QLoRA"), name if "LoRA" in name else f"LoRA, {name}"
    run = whole_run(name)
    steps = steps_of(home, run, *way(name))
    expected, merged = adapted_loop(home / "base", steps, 7, quantized)
    for (loss, norm), (true_loss, true_norm) in zip(logged(run), expected, strict=True):
        assert loss == pytest.approx(true_loss, rel=1e-5)
        assert norm == pytest.approx(true_norm, rel=1e-4)
    folder = run.stage("assistant").hf
    written = weights(run)
    assert set(written) == set(merged)
    for parameter, whole in merged.items():
        assert (written[parameter] - whole).abs().max() <= 1e-5, parameter
    below = AutoModelForCausalLM.from_pretrained(home / "base", **four_bits(quantized))
    keep_four_bits_as_stored(below)
    loaded = peft.PeftModel.from_pretrained(below, folder / "adapter").eval()
    tokens = torch.arange(20)[None]
    together = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert apart(loaded(tokens).logits, together(tokens).logits) <= 1e-5


@pytest.mark.ranks
def test_an_adapter_starts_from_an_import_as_from_its_folder(home: Path, tmp_path: Path) -> None:
    import_model(home / "base", home / "imported")
    every_layer = "stages.assistant.adapter={rank: 4}"
    imported = [*way("distributed tensor 2"), every_layer, "stages.assistant.start_from=imported"]
    run = tuned(home, tmp_path / "run", *imported)
    expected = tuned(home, tmp_path / "expected", *way("one rank"), every_layer)
    for (loss, norm), (true_loss, true_norm) in zip(logged(run), logged(expected), strict=True):
        assert loss == pytest.approx(true_loss, rel=1e-5)
        assert norm == pytest.approx(true_norm, rel=1e-4)
    ours, whole = weights(run), weights(expected)
    assert all((ours[name] - whole[name]).abs().max() <= 1e-5 for name in whole)


def four_bits(quantized: bool) -> dict[str, Any]:
    if not quantized:
        return {}
    nf4_twice = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **nf4_twice
    )
    return {"quantization_config": config}


def apart(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return float((ours - expected).abs().max() / expected.abs().max())


BY_PEFT = ["IA3, ZeRO 3 on 2 ranks", "prefix, ZeRO 1 on 2 ranks", "prompt, ZeRO 1 on 2 ranks"]


@pytest.mark.ranks
@pytest.mark.parametrize("name", BY_PEFT)
def test_an_adapter_learns_as_peft_s_model_does(name: str, home: Path, whole_run: WholeRun) -> None:
    run = whole_run(name)
    method = name.partition(",")[0].lower()
    virtual = {} if method == "ia3" else {"virtual_tokens": 4}
    base = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32)
    model: Any = with_adapter(base, Adapter(method=method, **virtual), seed=7)
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decay = 0.0 if method == "ia3" else 0.1
    optimizer = torch.optim.AdamW(leaves, LEARNING_RATE, (0.9, 0.95), 1e-5, weight_decay=decay)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens).logits[:, -tokens.shape[1] :]

    expected = trained_alone(logits, optimizer, steps_of(home, run, *way(name)))
    for (loss, norm), (true_loss, true_norm) in zip(logged(run), expected, strict=True):
        assert loss == pytest.approx(true_loss, rel=1e-5)
        assert norm == pytest.approx(true_norm, rel=1e-4)
    lines = run.stage("assistant").metrics()
    validated = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert validated[-1] < validated[0]
    folder, tokens = run.stage("assistant").hf, torch.arange(20)[None]
    below = AutoModelForCausalLM.from_pretrained(home / "base")
    loaded = peft.PeftModel.from_pretrained(below, folder / "adapter").eval()
    ours, tokenizer = load_model(folder)
    assert apart(loaded(tokens).logits, model.eval()(tokens).logits) <= 1e-5
    assert apart(ours(tokens).logits, model(tokens).logits) <= 1e-5
    if method != "ia3":
        check_virtual_tokens_are_used(folder, logits, tokenizer)


def check_virtual_tokens_are_used(
    folder: Path, logits: Callable[[torch.Tensor], torch.Tensor], tokenizer: Any
) -> None:
    """What generates text and scores it does so behind them; what would lose them is refused."""
    tokens = tokenizer("what is up?", return_tensors="pt", add_special_tokens=False)["input_ids"]
    own = tokens
    for _ in range(8):
        own = torch.cat([own, logits(own)[:, -1].argmax(-1, keepdim=True)], 1)
    said = tokenizer.decode(own[0, tokens.shape[1] :], skip_special_tokens=True)
    greedy = {"decoding": "greedy", "max_new_tokens": 8}
    found, _ = generate_text(str(folder), "what is up?", greedy, 0, raw=True)
    assert found and said.startswith(found)
    text = folder.parent / "text.txt"
    text.write_text("the sky; the sea")
    end = torch.tensor([[tokenizer.eos_token_id]])
    scored = tokenizer("the sky; the sea", return_tensors="pt", add_special_tokens=False)
    read = torch.cat([end, scored["input_ids"]], 1)
    nats = cross_entropy(logits(read)[0, :-1], read[0, 1:])
    asked = Measures(Texts([text], None, None), None, None, None)
    figures = evaluate(str(folder), asked, 0, Console(quiet=True))[str(text)]
    assert figures["perplexity"] == pytest.approx(float(nats.exp()), rel=1e-4)
    with pytest.raises(RecipeError, match=r"the virtual tokens in adapter/ .* would be lost"):
        read_architecture(folder)


def test_a_layer_that_can_have_no_adapter_is_named(home: Path, tmp_path: Path) -> None:
    for target, engine in (("nonsense", "one rank"), ("lm_head", "ZeRO 0")):
        wrong = [*way(engine), f"stages.assistant.adapter={{targets: [q_proj, {target}]}}"]
        with pytest.raises(StageError) as told:
            tuned(home, tmp_path / target, *wrong)
        assert f"adapter.targets: '{target}' is no linear layer of the model" in str(told.value)
        assert "use down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj or v_proj" in str(
            told.value
        )
