"""A Hugging Face decoder of which at most a block's weights are in memory.

Shape legend: s positions, d hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from llmscale.errors import RecipeError
from llmscale.models.stored_weights import HuggingFaceWeights


@contextmanager
def weights_on_meta() -> Iterator[None]:
    """Modules made within have buffers, and weights without memory."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class BlockwiseModel:
    """A causal language model from a folder, loaded a block at a time, in fp32.

    Raises:
        RecipeError: if the folder holds no decoder.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            self.config = AutoConfig.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
            if getattr(self.config, "quantization_config", None) is not None:
                raise ValueError("its weights are quantized already; give the model they come from")
            self.weights = HuggingFaceWeights(folder)
            with weights_on_meta():
                self.model = AutoModelForCausalLM.from_config(
                    self.config, dtype=torch.float32, attn_implementation="sdpa"
                ).eval()
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            cause = str(error).strip().splitlines()[0].removeprefix(f"{folder}: ")
            raise RecipeError(
                f"{folder}: cannot be quantized: {cause}; give a Hugging Face folder or "
                "RUN_DIR:STAGE"
            ) from None
        self.folder = folder
        self.prefix, self.blocks = _blocks(self.model, folder)
        self.names = [
            name for name, part in self.blocks[0].named_modules() if isinstance(part, nn.Linear)
        ]

    def require_linear_layers(self) -> None:
        """Checks that the blocks' large weights are those of linear layers.

        Raises:
            RecipeError: if they are not.
        """
        if any(parameter.ndim > 2 for parameter in self.blocks[0].parameters()):
            raise RecipeError(
                f"{self.folder}: its experts are no linear layers, and would be left out; use nf4 "
                "or fp4"
            )
        if not self.names:
            raise RecipeError(
                f"{self.folder}: its blocks have no linear layers (torch.nn.Linear); give a model "
                "of another family, such as llama or qwen"
            )

    def block_tensors(self, number: int) -> dict[str, Tensor]:
        """A block's tensors by their names within it, as stored.

        Raises:
            RecipeError: if one is missing.
        """
        block = self.blocks[number]
        return {name: self._tensor(f"{self.prefix}.{number}.{name}") for name in block.state_dict()}

    @contextmanager
    def loaded(self, number: int) -> Iterator[nn.Module]:
        """A block with its weights, within.

        Raises:
            RecipeError: if a weight is missing, or is not a number.
        """
        block = self.blocks[number]
        tensors = {name: tensor.float() for name, tensor in self.block_tensors(number).items()}
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise RecipeError(
                    f"{self.folder}: {self.prefix}.{number}.{name} holds numbers that are not "
                    "finite; give a model that was saved whole"
                )
        block.load_state_dict(tensors, assign=True)
        try:
            yield block
        finally:
            _drop(block, tensors)

    def other_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors outside the blocks: embeddings, norms, the head where it is no copy."""
        for name in self.weights:
            if not name.startswith(f"{self.prefix}."):
                yield name, self.weights[name]

    @torch.no_grad()
    def first_inputs(self, windows_ns: Tensor) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """What goes into the first block for each window [1, s, d], and what each block is told.

        That is the same for all windows: positions, and the mask where there is one.
        """
        begun = self.model.base_model
        prefix = self.model.base_model_prefix
        base = f"{prefix}." if hasattr(self.model, prefix) else ""
        tensors = {
            name: self._tensor(f"{base}{name}").float()
            for name in begun.state_dict()
            if not f"{base}{name}".startswith(f"{self.prefix}.")
        }
        begun.load_state_dict(tensors, strict=False, assign=True)
        hidden: list[Tensor] = []
        told: list[dict[str, Any]] = [{} for _ in self.blocks]

        def noted(number: int) -> Any:
            def forward(hidden_states: Tensor, *_: Any, **options: Any) -> Tensor:
                if number == 0:
                    hidden.append(hidden_states)
                told[number] = options
                return hidden_states

            return forward

        for number, block in enumerate(self.blocks):
            block.forward = noted(number)
        try:
            for window_s in windows_ns:
                begun(input_ids=window_s[None], use_cache=False)
        finally:
            for block in self.blocks:
                del block.forward
            _drop(begun, tensors)
        return hidden, told

    def _tensor(self, name: str) -> Tensor:
        try:
            return self.weights[name]
        except KeyError:
            raise RecipeError(
                f"{self.folder}: has no tensor {name}; give a folder that was saved whole"
            ) from None


def _drop(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    module.load_state_dict(meta, strict=False, assign=True)


def _blocks(model: Any, folder: Path) -> tuple[str, nn.ModuleList]:
    count = getattr(model.config, "num_hidden_layers", 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise RecipeError(f"{folder}: {model.config.model_type} has no row of blocks; give a decoder")
