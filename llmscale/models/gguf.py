"""GGUF files, as llama.cpp has them, to Hugging Face folders."""

from pathlib import Path
from typing import Any

import torch

from llmscale.artifacts import new_folder
from llmscale.errors import MachineError, RecipeError


def gguf_to_folder(file: Path, target: Path) -> int:
    """Writes a Hugging Face folder with a GGUF file's weights, in fp32, and its tokenizer.

    Returns:
        The number of parameters.

    Raises:
        RecipeError: if transformers cannot read the file.
        MachineError: if a package that reads such files is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    loading: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **loading)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **loading)
    except ImportError:
        raise MachineError(
            f"{file}: packages that read GGUF are missing; pip install 'llmscale[gguf]'"
        ) from None
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        cause = str(error).strip().splitlines()[0]
        raise RecipeError(f"{file}: cannot be read: {cause}; give another file") from None
    model.hf_quantizer = None  # the weights are whole numbers of bits no more
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with new_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
