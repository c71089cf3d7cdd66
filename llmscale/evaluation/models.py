"""Loading a Hugging Face folder to look at it: never with code of the folder's own."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

import llmscale.quiet  # noqa: F401
from llmscale.data.tokenizer import load_tokenizer
from llmscale.errors import MachineError, RecipeError
from llmscale.models.huggingface_config import require_next_tokens, virtual_tokens_beside
from llmscale.models.quantized import require_packages_of
from llmscale.packages import require_package


def load_model(folder: Path, device: str = "cpu") -> tuple[Any, Any]:
    """A causal language model and its tokenizer, in the weights' own precision.

    Virtual tokens that the folder has beside the weights are a part of it.

    Raises:
        MachineError: if they need a package that is missing.
        RecipeError: if the folder does not hold both.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    try:
        require_packages_of(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        require_next_tokens(config)
        half = device == "cpu" and config.dtype == torch.float16
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32 if half else "auto",
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        if found["missing_keys"]:
            raise ValueError(f"it has no tensor {min(found['missing_keys'])}")
        tokenizer = load_tokenizer(folder)
        if virtual_tokens_beside(folder):
            model = _with_virtual_tokens(model, folder / "adapter")
    except ImportError as error:
        cause = str(error).strip().splitlines()[0]
        raise MachineError(f"{folder}: {cause}; or give the model it was quantized from") from None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        cause = str(error).strip().splitlines()[0]
        raise RecipeError(
            f"{folder}: cannot be loaded: {cause}; give a Hugging Face folder or RUN_DIR:STAGE"
        ) from None
    return model.to(device).eval(), tokenizer


def _with_virtual_tokens(model: Any, folder: Path) -> Any:
    require_package(str(folder), "peft", "deepspeed")
    import peft

    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError("adapter/ has no adapter_model.safetensors")
    adapted = peft.PeftModel.from_pretrained(model, folder, local_files_only=True)
    # They take up positions that are not left for a text.
    model.config.max_position_embeddings -= adapted.active_peft_config.num_virtual_tokens
    return adapted
