"""Loading a Hugging Face folder to look at it: never with code of the folder's own."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

import llmscale.quiet  # noqa: F401
from llmscale.data.tokenizer import load_tokenizer
from llmscale.errors import RecipeError
from llmscale.models.architecture import FAMILIES


def load_model(folder: Path, device: str = "cpu") -> tuple[Any, Any]:
    """A causal language model and its tokenizer, in the weights' own precision.

    Raises:
        RecipeError: if the folder does not hold both.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        traits = FAMILIES.get(config.model_type)
        if traits is not None and traits.objective != "causal":
            raise ValueError(f"{config.model_type} does not go on from a text")
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, use_safetensors=True
        )
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        cause = str(error).strip().splitlines()[0]
        raise RecipeError(
            f"{folder}: cannot be loaded: {cause}; give a Hugging Face folder or RUN_DIR:STAGE"
        ) from None
    if device == "cpu" and model.dtype == torch.float16:
        model = model.float()
    return model.to(device).eval(), tokenizer
