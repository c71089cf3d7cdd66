"""A Hugging Face decoder of which at most a block's weights are in memory.

Shape legend: n windows, s positions, d hidden size, v vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from llmscale.errors import RecipeError
from llmscale.models.huggingface_config import require_next_tokens, virtual_tokens_beside
from llmscale.models.stored_weights import HuggingFaceWeights
from llmscale.parallel.memory import give_back_freed_memory

LOGITS_AT_ONCE = 2**22
"""Numbers: 16 MiB, several times."""


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


class StoredTensors(Protocol):
    """Tensors by name, each read when it is asked for."""

    def __contains__(self, name: str) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def __getitem__(self, name: str) -> Tensor: ...


class BlockwiseModel:
    """A causal language model from a folder, loaded a block at a time, in fp32.

    Raises:
        RecipeError: if the folder holds no decoder.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig

        try:
            self.config = AutoConfig.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
            require_next_tokens(self.config)
            if virtual_tokens_beside(folder):
                raise ValueError("the virtual tokens in adapter/ would be lost")
            if getattr(self.config, "quantization_config", None) is not None:
                raise ValueError("its weights are quantized already; give the model they come from")
            # Making a model in fp32 changes what its configuration says.
            self.dtype = self.config.dtype
            self.weights: StoredTensors = HuggingFaceWeights(folder)
            self.model = _without_weights(self.config)
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

    def require_finite(self) -> None:
        """Checks all tensors where they are not read otherwise.

        Raises:
            RecipeError: names one that is not made of numbers.
        """
        for name in self.weights:
            self._tensor(name)

    def untie(self) -> None:
        """Gives the model a head of its own."""
        self.config.tie_word_embeddings = False
        self.model = _without_weights(self.config)
        self.prefix, self.blocks = _blocks(self.model, self.folder)

    def layers(self) -> list[str]:
        """The full names of the blocks' linear layers."""
        return [
            f"{self.prefix}.{number}.{name}"
            for number in range(len(self.blocks))
            for name in self.names
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
            RecipeError: if a weight is missing, not a number, or of another shape.
        """
        block = self.blocks[number]
        tensors = {name: tensor.float() for name, tensor in self.block_tensors(number).items()}
        self._assign(block, tensors)
        try:
            yield block
        finally:
            _drop(block, tensors)

    def other_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors outside the blocks: embeddings, norms, the head where it is no copy."""
        for name in self.weights:
            if not name.startswith(f"{self.prefix}."):
                yield name, self._tensor(name)

    @torch.no_grad()
    def first_inputs(self, windows_ns: Tensor) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """What goes into the first block for each window [1, s, d], and what each block is told.

        That is the same for all windows: positions, and the mask where there is one.
        """
        hidden: list[Tensor] = []
        told: list[dict[str, Any]] = [{} for _ in self.blocks]

        def note(number: int, inputs: Tensor, options: dict[str, Any]) -> Tensor:
            if number == 0:
                hidden.append(inputs)
            told[number] = options
            return inputs

        with self._blocks_replaced(note):
            for window_s in windows_ns:
                self.model.base_model(input_ids=window_s[None], use_cache=False)
        return hidden, told

    def last_gradients(
        self, windows_ns: Tensor, outputs: Sequence[Tensor], seed: int = 0
    ) -> list[Tensor]:
        """Gradients by the last block's outputs [1, s, d] of each window, in nats.

        They are those of the negative log-likelihood, summed over a window, of next tokens that
        are drawn from what the model itself expects. Some positions at a time: a vocabulary's
        logits of a whole window can be larger than the model.
        """
        random = torch.Generator().manual_seed(seed)
        at_once = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
        lasts = [output.detach().requires_grad_() for output in outputs]
        last = lasts[0]

        def answer(number: int, inputs: Tensor, _: dict[str, Any]) -> Tensor:
            return last if number == len(self.blocks) - 1 else inputs

        gradients: list[Tensor] = []
        with self._blocks_replaced(answer):
            for window_s, last in zip(windows_ns, lasts, strict=True):
                gradient = torch.zeros_like(last)
                for places in torch.arange(len(window_s)).split(at_once):
                    logits_sv = self.model(
                        input_ids=window_s[None], use_cache=False, logits_to_keep=places
                    ).logits[0]
                    if len(logits_sv) > len(places):  # Some models know no logits_to_keep.
                        logits_sv = logits_sv[places]
                    drawn_s = logits_sv.detach().softmax(-1).multinomial(1, generator=random)[:, 0]
                    loss = torch.nn.functional.cross_entropy(logits_sv, drawn_s, reduction="sum")
                    gradient += torch.autograd.grad(loss, last)[0]
                gradients.append(gradient)
        return gradients

    @contextmanager
    def _blocks_replaced(
        self, answer: Callable[[int, Tensor, dict[str, Any]], Tensor]
    ) -> Iterator[None]:
        """The model loaded but for its blocks, which give an answer instead.

        Args:
            answer: to a block's number, its inputs [1, s, d], and what else it is told.
        """
        tied = self.model.all_tied_weights_keys
        tensors = {
            name: self._tensor(name if name in self.weights else tied.get(name, name)).float()
            for name in self.model.state_dict()
            if not name.startswith(f"{self.prefix}.")
        }
        self._assign(self.model, tensors)

        def answering(number: int) -> Any:
            def forward(hidden_states: Tensor, *_: Any, **options: Any) -> Tensor:
                return answer(number, hidden_states, options)

            return forward

        for number, block in enumerate(self.blocks):
            block.forward = answering(number)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward
            _drop(self.model, tensors)
            tensors.clear()
            give_back_freed_memory()

    def _assign(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        try:
            module.load_state_dict(tensors, strict=False, assign=True)
        except RuntimeError as error:
            raise RecipeError(
                f"{self.folder}: {_last_line(error)}; give a folder whose config.json is that of "
                "its weights"
            ) from None

    def _tensor(self, name: str) -> Tensor:
        try:
            tensor = self.weights[name]
        except KeyError:
            raise RecipeError(
                f"{self.folder}: has no tensor {name}; give a folder that was saved whole"
            ) from None
        except (OSError, SafetensorError) as error:
            raise RecipeError(
                f"{self.folder}: {name} cannot be read: {_last_line(error)}; give a folder that "
                "was saved whole"
            ) from None
        if not torch.isfinite(tensor).all():
            raise RecipeError(
                f"{self.folder}: {name} holds numbers that are not finite; give a model that was "
                "saved whole"
            )
        return tensor


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()


def _without_weights(config: Any) -> Any:
    """The model that a configuration describes."""
    from transformers import AutoModelForCausalLM

    with weights_on_meta():
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()


def _drop(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    module.load_state_dict(meta, strict=False, assign=True)


def _blocks(model: Any, folder: Path) -> tuple[str, nn.ModuleList]:
    count = getattr(model.config, "num_hidden_layers", 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise RecipeError(f"{folder}: {model.config.model_type} has no row of blocks; give a decoder")
