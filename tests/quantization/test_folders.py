"""What is written is what others read: bit for bit, by every scheme."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmscale.errors import RecipeError
from llmscale.evaluation.generation import Generation, continuations
from llmscale.evaluation.models import load_model
from llmscale.parallel import probes
from llmscale.quantization import layers
from llmscale.quantization.activations import InputGrid
from llmscale.quantization.block import layers_by_input, quantize_block
from llmscale.quantization.blocks import BlockwiseModel
from llmscale.quantization.calibration import calibration_windows
from llmscale.quantization.families import by_output, divided_outputs, shares
from llmscale.quantization.formats import scheme as package_scheme
from llmscale.quantization.formats import stored_tensors
from llmscale.quantization.grids import find_grid
from llmscale.quantization.layers import QuantizedLayer, Recipe
from llmscale.quantization.quantize import Listener, quantize
from llmscale.quantization.schemes import SCHEMES, Quantization, SchemeName
from tests.quantization.small import TEXT, small_llama

LETTERS = TEXT.read_text(encoding="utf-8")[:8000]
BITS = {
    "int8": (8, 8.5),
    "int4": (4, 4.6),
    "mixed": (4, 5),
    "fp8": (8, 8.5),
    "nf4": (4, 5),
    "fp4": (4, 5),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("model") / "llama")


def logits(folder: Path) -> torch.Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return loaded(torch.arange(5, 60)[None]).logits


@pytest.mark.parametrize("name", SCHEMES)
def test_each_folder_loads_generates_and_stays_near_its_model(
    name: SchemeName, model: Path, tmp_path: Path
) -> None:
    texts = [LETTERS] if SCHEMES[name].calibrated else None
    figures = quantize(model, tmp_path / "out", Quantization(scheme=name), texts, tokens=1024)

    least, most = BITS[name.removeprefix("llm-").split("-")[0]]
    assert least <= figures["bits_per_weight"] <= most
    assert figures["megabytes"] < 0.5
    loaded, tokenizer = load_model(tmp_path / "out")
    assert continuations(loaded, tokenizer, "HAMLET.", Generation(max_new_tokens=4), seed=1)[0]
    expected = logits(model)
    apart = (logits(tmp_path / "out") - expected).norm() / expected.norm()
    assert apart < {"int8": 0.15, "llm": 0.15, "fp8": 0.3}.get(name.split("-")[0], 0.7)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("name", "symmetric"),
    [
        *(
            (name, True)
            for name in ("int4-weight", "int4-gptq", "int8-weight", "int8-static", "fp8")
        ),
        *((name, False) for name in ("int4-weight", "int4-gptq")),
    ],
)
def test_the_package_reads_back_our_own_numbers(name: SchemeName, symmetric: bool) -> None:
    scheme = Quantization(scheme=name, symmetric=symmetric).composition()
    recipe = Recipe(scheme, 32 if scheme.grouped else None, torch.bfloat16)
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(2)) + 0.1
    grid = find_grid(weight, scheme.weights, recipe.group_size, recipe.dtype)
    inputs = InputGrid(torch.ones(1), torch.full((1,), 9.0)) if "static" in name else None
    layer = QuantizedLayer(grid.codes(weight), grid, inputs)

    stored = stored_tensors(layer, recipe)

    form = package_scheme(recipe)
    compressor = BaseCompressor.get_value_from_registry(form.format)
    in_fp32 = {k: t.float() if t.dtype == torch.bfloat16 else t for k, t in stored.items()}
    assert torch.equal(compressor.decompress(in_fp32, form)["weight"], layer.weight_oi)
    in_bf16 = compressor.decompress(stored, form)["weight"]
    assert torch.equal(in_bf16, layer.weight_oi.bfloat16())


def test_transformers_holds_the_weights_that_calibration_went_on_with(
    model: Path, tmp_path: Path
) -> None:
    blockwise = BlockwiseModel(model)
    _, tokenizer = load_model(model)
    windows = calibration_windows([LETTERS], tokenizer, 1024, 64, "text")
    recipe = Recipe(SCHEMES["int4-gptq"], 64, torch.bfloat16)
    hidden, told = blockwise.first_inputs(windows)
    with blockwise.loaded(0) as block:
        groups = layers_by_input(block, blockwise.names, hidden[0], told[0])
        _, outputs = quantize_block(block, groups, recipe, hidden, told[0], blockwise.config)
        ours = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=probes.quick_bf16()):
            again = [block(one, **told[0]) for one in hidden]
    assert groups == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    for ours_1sd, again_1sd in zip(outputs, again, strict=True):
        assert torch.allclose(ours_1sd, again_1sd, atol=1e-5)

    quantize(model, tmp_path / "out", Quantization(scheme="int4-gptq"), [LETTERS], tokens=1024)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        loaded(torch.arange(5)[None])  # decompresses
    theirs = loaded.model.layers[0].state_dict()
    for name in blockwise.names:
        assert torch.equal(theirs[f"{name}.weight"], ours[f"{name}.weight"]), name


def test_a_calibration_in_bf16_stays_as_near_as_one_in_fp32(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, apart = logits(model), {}
    for name, there in (("bf16", True), ("fp32", False)):
        monkeypatch.setattr(probes, "quick_bf16", lambda there=there: there)
        quantize(model, tmp_path / name, Quantization(scheme="int4-gptq"), [LETTERS], tokens=1024)
        apart[name] = float((logits(tmp_path / name) - expected).norm())
    assert apart["bf16"] != apart["fp32"]
    assert apart["bf16"] == pytest.approx(apart["fp32"], rel=0.1)


def test_scaling_leaves_the_models_outputs(model: Path, tmp_path: Path) -> None:
    """The scales of a layer's inputs go into what comes before, in every place there is one."""
    blockwise = BlockwiseModel(model)
    tensors = load_file(model / "model.safetensors")
    random = torch.Generator().manual_seed(4)
    for number in range(2):
        prefix = f"model.layers.{number}."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        for group in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ):
            columns = own[f"{group[0]}.weight"].shape[1]
            shares_i = shares(group[0], blockwise.config, columns)
            assert shares_i is not None
            scales = torch.rand(columns, generator=random) + 0.3
            scales = scales[: int(shares_i.max()) + 1][shares_i]
            own |= divided_outputs(own, group[0], by_output(scales, shares_i))
            for name in group:
                own[f"{name}.weight"] = own[f"{name}.weight"] * scales
        tensors |= {f"{prefix}{name}": tensor.contiguous() for name, tensor in own.items()}
    scaled = Path(shutil.copytree(model, tmp_path / "scaled"))
    save_file(tensors, scaled / "model.safetensors", metadata={"format": "pt"})

    assert not torch.equal(logits(scaled), logits(model))
    assert (logits(scaled) - logits(model)).abs().max() < 1e-4


def test_static_scales_are_the_greatest_inputs_of_the_calibration(
    model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(model, out, Quantization(scheme="fp8-static"), [LETTERS], tokens=1024)
    stored = load_file(out / "block-00000.safetensors")

    loaded, tokenizer = load_model(model)
    windows = calibration_windows([LETTERS], tokenizer, 1024, 64, "text")
    seen = {"self_attn.q_proj": 0.0, "self_attn.k_proj": 0.0}
    for name in seen:
        loaded.model.layers[0].get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: seen.__setitem__(
                name, max(seen[name], float(given[0].abs().max()))
            )
        )
    with torch.no_grad():
        for window in windows:
            loaded(window[None])
    for name, largest in seen.items():
        scale = stored[f"model.layers.0.{name}.input_scale"]
        assert scale.dtype == torch.bfloat16
        assert torch.equal(scale, torch.tensor([largest / 448]).bfloat16())


@pytest.mark.parametrize(("largest_noise", "groups"), [(1e-4, 2), (0, 1)])
def test_layers_whose_inputs_need_a_scale_a_token_are_stored_as_such(
    largest_noise: float,
    groups: int,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layers, "LARGEST_NOISE", largest_noise)
    out, said = tmp_path / "out", []
    settings, listener = Quantization(scheme="int8-static"), Listener(say=said.append)

    figures = quantize(model, out, settings, [LETTERS], tokens=1024, listener=listener)

    stored = {n for file in out.glob("block-*.safetensors") for n in load_file(file)}
    by_token = {
        name for name in BlockwiseModel(model).layers() if f"{name}.input_scale" not in stored
    }
    assert 0 < len(by_token) <= 14
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == groups
    assert figures["layers_by_token"] == len(by_token)
    assert said == [
        f"int8-static: {len(by_token)} of 14 layers have a scale a token for their inputs: one a "
        f"layer adds more than {largest_noise:g} of their outputs' mean square"
    ]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    for name in BlockwiseModel(model).layers():
        inputs = loaded.get_submodule(name).quantization_scheme.input_activations
        assert (inputs.dynamic, inputs.strategy) == (
            name in by_token,
            "token" if name in by_token else "tensor",
        )
    expected = logits(model)
    assert (logits(out) - expected).norm() / expected.norm() < 0.15


def test_tied_embeddings_stay_tied_and_others_stay_apart(tmp_path: Path) -> None:
    for tied in (True, False):
        source = small_llama(tmp_path / f"tied-{tied}", tied=tied)
        out = tmp_path / f"out-{tied}"
        quantize(source, out, Quantization(scheme="int8-weight"))
        before = load_file(source / "model.safetensors")
        kept = load_file(out / "others.safetensors")
        assert ("lm_head.weight" in kept) is (not tied)
        for name, tensor in kept.items():
            assert torch.equal(tensor, before[name].bfloat16()), name
        loaded = AutoModelForCausalLM.from_pretrained(out)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied


def test_weights_that_are_no_numbers_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    spoilt = Path(shutil.copytree(model, tmp_path / "spoilt"))
    tensors = load_file(spoilt / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds numbers"):
        quantize(spoilt, tmp_path / "out", Quantization(scheme="int8-weight"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["int4-gptq", "int4-awq", "int8-static", "int8-smoothquant", "fp8-static"]
)
def test_inputs_that_are_no_numbers_are_refused(
    name: SchemeName, model: Path, tmp_path: Path
) -> None:
    spoilt = Path(shutil.copytree(model, tmp_path / "spoilt"))
    tensors = load_file(spoilt / "model.safetensors")
    tensors["model.layers.0.post_attention_layernorm.weight"][:] = 3e38
    save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"the inputs of mlp\.\w+ are not finite"):
        quantize(spoilt, tmp_path / "out", Quantization(scheme=name), [LETTERS], tokens=1024)
    assert not (tmp_path / "out").exists()


def test_keys_that_are_no_numbers_are_refused(model: Path, tmp_path: Path) -> None:
    spoilt = Path(shutil.copytree(model, tmp_path / "spoilt"))
    tensors = load_file(spoilt / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][:] = 3e38
    save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="keys or values are not finite"):
        settings = Quantization(scheme="int8-weight", key_value_cache="fp8")
        quantize(spoilt, tmp_path / "out", settings, [LETTERS], tokens=1024)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["int8-weight", "int4-weight", "nf4"])
def test_a_quantized_model_of_half_precision_is_loaded_on_a_cpu(
    name: SchemeName, model: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).save_pretrained(half)
    AutoTokenizer.from_pretrained(model).save_pretrained(half)
    quantize(half, tmp_path / "out", Quantization(scheme=name))
    stored = {
        tensor.dtype
        for file in (tmp_path / "out").glob("*.safetensors")
        for key, tensor in load_file(file).items()
        if key.endswith("norm.weight") or "embed" in key
    }
    assert stored == {torch.float16}
    loaded, _ = load_model(tmp_path / "out")
    with torch.no_grad():
        assert loaded(torch.arange(5, 60)[None]).logits.isfinite().all()


def test_a_quantized_model_is_not_quantized_again(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "once", Quantization(scheme="int8-weight"))
    with pytest.raises(RecipeError, match="quantized already"):
        quantize(tmp_path / "once", tmp_path / "twice", Quantization(scheme="int4-weight"))


@pytest.mark.parametrize("scheme", ["int8-weight", "int4-gptq", "nf4"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_numbers_outside_the_blocks_that_are_not_finite_are_refused_by_name(
    scheme: SchemeName, name: str, model: Path, tmp_path: Path
) -> None:
    spoilt = Path(shutil.copytree(model, tmp_path / "spoilt"))
    tensors = load_file(spoilt / "model.safetensors")
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=f"{name} holds numbers that are not finite"):
        quantize(spoilt, tmp_path / "out", Quantization(scheme=scheme), [LETTERS], tokens=1024)
    assert not (tmp_path / "out").exists()


def test_virtual_tokens_are_not_lost_unsaid(model: Path, tmp_path: Path) -> None:
    adapted = Path(shutil.copytree(model, tmp_path / "adapted"))
    (adapted / "adapter").mkdir()
    (adapted / "adapter/adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    with pytest.raises(RecipeError, match="the virtual tokens in adapter/ would be lost"):
        quantize(adapted, tmp_path / "out", Quantization(scheme="int8-weight"))


def test_a_model_that_scores_texts_is_refused(model: Path, tmp_path: Path) -> None:
    scoring = Path(shutil.copytree(model, tmp_path / "scoring"))
    config = json.loads((scoring / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (scoring / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="it scores texts"):
        quantize(scoring, tmp_path / "out", Quantization(scheme="int8-weight"))


def test_a_folder_whose_configuration_is_of_other_weights_is_refused(
    model: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["intermediate_size"] = 192
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"config\.json is that of its weights") as error:
        quantize(other, tmp_path / "out", Quantization(scheme="int8-weight"))
    assert "\n" not in str(error.value)
    with pytest.raises(RecipeError, match="cannot be loaded") as error:
        load_model(other)
    assert "\n" not in str(error.value)


def test_a_file_that_was_cut_off_is_refused(model: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(model, tmp_path / "cut"))
    file = cut / "model.safetensors"
    names = list(load_file(file))
    (cut / "part.safetensors").write_bytes(file.read_bytes()[:-100])
    file.unlink()
    index = {"weight_map": dict.fromkeys(names, "part.safetensors")}
    (cut / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RecipeError, match="cannot be read") as error:
        quantize(cut, tmp_path / "out", Quantization(scheme="int8-weight"))
    assert "\n" not in str(error.value)


def test_a_model_without_some_of_its_tensors_is_not_evaluated(model: Path, tmp_path: Path) -> None:
    partial = Path(shutil.copytree(model, tmp_path / "partial"))
    tensors = load_file(partial / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"has no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(partial)
