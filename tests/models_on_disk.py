"""A small Llama with a tokenizer, as a user has it: a Hugging Face folder."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmscale.data.tokenizer import train_tokenizer

WORDS = "ask and answer, add one and two: three. what is up? the sky; what is down? the sea. "


def small_llama(folder: Path, *, heads: int = 4, key_value_heads: int = 2) -> Path:
    """Writes a model of two layers with random weights."""
    tokenizer = train_tokenizer(iter([WORDS] * 20), "bpe", 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8 * heads,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
