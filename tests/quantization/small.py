"""What tests of quantization share: a small Llama of uneven weights, and texts."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmscale.data.tokenizer import train_tokenizer

TEXT = Path(__file__).parents[2] / "recipes" / "texts" / "shakespeare" / "hamlet.txt"


def recipe_beside_llama(folder: Path, recipe: str) -> Path:
    """The file of a recipe, and ``llama`` beside it."""
    small_llama(folder / "llama")
    file = folder / "recipe.yaml"
    file.write_text(recipe)
    return file


def small_llama(folder: Path, *, tied: bool = True, **changes: int) -> Path:
    """Writes a model of two layers with random weights, some columns larger than others."""
    tokenizer = train_tokenizer(iter([TEXT.read_text(encoding="utf-8")[:20000]]), "bpe", 400)
    torch.manual_seed(5)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        initializer_range=0.15,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **{**sizes, **changes},
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 1:
                parameter.mul_(torch.rand(len(parameter)) * 3 + 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
