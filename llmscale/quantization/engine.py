"""Quantizing a Hugging Face folder block by block, resumable after every block.

Ranks that share a calibration each have their windows, and quantize alike; the first one writes.

Shape legend: n windows, s tokens in one, d hidden size.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmscale.quiet  # noqa: F401
from llmscale.artifacts import (
    fingerprint,
    folder_fingerprint,
    publish_folder,
    read_json,
    sync_file,
    write_json,
)
from llmscale.models.stored_weights import INDEX
from llmscale.parallel import probes, shares
from llmscale.parallel.memory import give_back_freed_memory
from llmscale.quantization.block import layers_by_input, quantize_block, round_block
from llmscale.quantization.blocks import BlockwiseModel
from llmscale.quantization.formats import quantization_config
from llmscale.quantization.layers import Recipe
from llmscale.quantization.mixed import wide_layers
from llmscale.quantization.sensitivity import PASSES

CALL = "call.json"
WIDE = "wide.json"
INPUTS = "inputs"
FIXED = ".input_scale"
LEFT_ALONE = (".safetensors", ".bin", ".pt", ".gguf")


def quantize_folder(
    model: BlockwiseModel,
    target: Path,
    recipe: Recipe,
    windows_ns: Tensor | None = None,
    on_block: Callable[[int, int], None] = lambda done, blocks: None,
) -> Recipe:
    """Writes ``target``, a folder with the model's weights quantized; goes on where it was.

    Collective where several ranks have met. Finished blocks wait beside the target, with what
    goes into the next one.

    Returns:
        The recipe with the names of the layers that have a format of their own.

    Raises:
        RecipeError: if the model cannot be quantized.
    """
    beside = shares.by_first(lambda: _begun(model.folder, target, recipe, windows_ns))
    blocks = len(model.blocks)
    before = 0
    if recipe.bits is not None:
        assert windows_ns is not None, "layers are told apart by a calibration"
        before = PASSES * blocks
        recipe = _with_formats(
            beside, model, recipe, windows_ns, lambda passed: on_block(passed, before + blocks)
        )
    done = shares.by_first(lambda: sum(1 for _ in _finished(beside, blocks)))
    on_block(before + done, before + blocks)
    stream = None
    if windows_ns is not None and done < blocks:
        stream = Stream.after(beside, model, windows_ns, done)
    for number in range(done, blocks):
        own = recipe.within(f"{model.prefix}.{number}.")
        with model.loaded(number) as block:
            if stream is None:
                tensors = round_block(block, model.names, own)
            else:
                tensors = stream.through(block, number, model, own)
        if stream is not None:
            stream.keep(beside, number + 1)
        shares.together()
        if shares.first():
            named = {f"{model.prefix}.{number}.{name}": t for name, t in tensors.items()}
            _save(named, beside / _shard(number))
        on_block(before + number + 1, before + blocks)
    del stream
    give_back_freed_memory()
    return shares.by_first(lambda: _finish(model, beside, target, recipe))


@dataclass
class Stream:
    """What goes into the next block for this rank's windows [1, s, d], and what blocks are told.

    It waits in a file beside the target, from which it is read as it is needed.
    """

    hidden: Sequence[Tensor]
    told: list[dict[str, Any]]
    groups: list[list[str]] | None = None

    @classmethod
    def after(cls, beside: Path, model: BlockwiseModel, windows_ns: Tensor, done: int) -> "Stream":
        """As it is when some blocks are done."""
        own_ns = shares.own(windows_ns)
        hidden, told = model.first_inputs(own_ns if done == 0 else own_ns[:1])
        if done:
            return cls(shares.own(_kept(beside, done)), told)
        stream = cls(hidden, told)
        stream.keep(beside, 0)
        return stream

    def through(
        self, block: torch.nn.Module, number: int, model: BlockwiseModel, recipe: Recipe
    ) -> dict[str, Tensor]:
        """Quantizes a block, whose tensors it gives, and goes through it."""
        if self.groups is None:
            self.groups = layers_by_input(block, model.names, self.hidden[0], self.told[number])
        tensors, self.hidden = quantize_block(
            block, self.groups, recipe, self.hidden, self.told[number], model.config
        )
        return tensors

    def keep(self, beside: Path, number: int) -> None:
        """Writes what goes into a block, and removes what went into the one before the last."""
        _save({INPUTS: torch.cat(list(self.hidden))}, beside / _inputs(number))
        self.hidden = load_file(beside / _inputs(number))[INPUTS].split(1)
        (beside / _inputs(number - 2)).unlink(missing_ok=True)


def _inputs(number: int) -> str:
    """The file in which this rank keeps what goes into a block."""
    rank, count = shares.place()
    return f"{INPUTS}-{number:05d}-{rank:03d}-{count:03d}.safetensors"


def _kept(beside: Path, number: int) -> list[Tensor]:
    """What goes into a block, of all windows, from however many ranks kept it."""
    parts: dict[str, list[Path]] = {}
    for file in sorted(beside.glob(f"{INPUTS}-{number:05d}-*.safetensors")):
        parts.setdefault(file.stem.rpartition("-")[2], []).append(file)
    whole = next(files for count, files in parts.items() if len(files) == int(count))
    return shares.interleaved([load_file(file)[INPUTS].split(1) for file in whole])


def _begun(source: Path, target: Path, recipe: Recipe, windows_ns: Tensor | None) -> Path:
    """The folder beside the target; a new one where that is not of the same call.

    Its name has no dot in front: what has one goes when a stage starts again.
    """
    beside = target.parent / f"{target.name}.quantizing"
    call = fingerprint(
        [
            folder_fingerprint(source),
            str(recipe),
            None if windows_ns is None else windows_ns.tolist(),
            torch.__version__,
            probes.quick_bf16(),
        ]
    )
    if beside.exists() and read_json(beside / CALL) != call:
        shutil.rmtree(beside)
    beside.mkdir(parents=True, exist_ok=True)
    write_json(beside / CALL, call)
    return beside


def _with_formats(
    beside: Path,
    model: BlockwiseModel,
    recipe: Recipe,
    windows_ns: Tensor,
    on_pass: Callable[[int], None],
) -> Recipe:
    """The recipe with the layers that get more bits, measured once a call."""

    def measured() -> list[str]:
        wide: list[str] | None = read_json(beside / WIDE)
        if wide is None:
            wide = wide_layers(model, recipe, windows_ns, beside, on_pass)
            write_json(beside / WIDE, wide)
        return wide

    return replace(recipe, wide=frozenset(shares.by_first(measured)))


def _finished(beside: Path, blocks: int) -> Iterator[int]:
    for number in range(blocks):
        if not (beside / _shard(number)).exists():
            return
        yield number


def _shard(number: int) -> str:
    return f"block-{number:05d}.safetensors"


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    part = file.with_suffix(".part")
    save_file(tensors, part, metadata={"format": "pt"})
    sync_file(part)
    part.rename(file)


def _finish(model: BlockwiseModel, beside: Path, target: Path, recipe: Recipe) -> Recipe:
    """Adds the rest of the model, and moves the folder into its place."""
    _save(
        {
            name: tensor.to(recipe.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in model.other_tensors()
        },
        beside / "others.safetensors",
    )
    places: dict[str, str] = {}
    size = 0
    for file in sorted(beside.glob("[bo]*.safetensors")):
        tensors = load_file(file)
        places |= dict.fromkeys(tensors, file.name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if recipe.scheme.fixed_inputs:
        fixed = {name.removesuffix(FIXED) for name in places if name.endswith(FIXED)}
        recipe = replace(recipe, by_token=frozenset(model.layers()) - fixed)
    write_json(beside / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    for file in model.folder.iterdir():
        if file.is_file() and file.suffix not in LEFT_ALONE and file.name != INDEX:
            shutil.copy(file, beside / file.name)
    config = read_json(model.folder / "config.json")
    outside = [
        name
        for name, module in model.model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.startswith(f"{model.prefix}.")
    ]
    config |= {
        "tie_word_embeddings": model.config.tie_word_embeddings,
        "dtype": str(recipe.dtype).removeprefix("torch."),
        "quantization_config": quantization_config(recipe, model.prefix, model.layers(), outside),
    }
    write_json(beside / "config.json", config)
    for file in [*beside.glob(f"{INPUTS}-*"), *beside.glob("*.part"), beside / CALL, beside / WIDE]:
        file.unlink(missing_ok=True)
    publish_folder(beside, target)
    return recipe
