"""bitsandbytes' own formats, by transformers' way to load and to save them."""

from pathlib import Path
from typing import Any, Literal

import torch

from llmscale.artifacts import new_folder
from llmscale.data.tokenizer import load_tokenizer


def write_bitsandbytes_folder(
    source: Path, target: Path, kind: Literal["nf4", "fp4", "int8"], dtype: torch.dtype
) -> None:
    """Writes ``target`` with the weights of linear layers in 4-bit blocks, or in 8 bits.

    Args:
        dtype: of all other numbers.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    how: dict[str, Any] = {"load_in_8bit": True}
    if kind != "int8":
        how = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_compute_dtype": dtype,
        }
    model = AutoModelForCausalLM.from_pretrained(
        source,
        local_files_only=True,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(**how),
        device_map={"": "cpu"},
    )
    tokenizer = load_tokenizer(source)
    with new_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
