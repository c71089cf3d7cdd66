"""A small random model that writes letters, and what a letter among them is worth.

The task: answers of 16 tokens out of 30, and the reward is the share of one token.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = [chr(ord("a") + number) for number in range(26)]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
VOCABULARY = SPECIAL + LETTERS
WANTED = "e"


def letters_model(folder: Path, heads: int = 4, seed: int = 11) -> Path:
    """Writes a Llama of two layers with random weights, whose tokens are letters."""
    vocabulary = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


def share_of_wanted(prompts: list[str], responses: list[str]) -> list[float]:
    """How much of an answer of 16 letters is the wanted one."""
    return [response.split().count(WANTED) / 16 for response in responses]


REWARDS = '''
def share(prompts, responses):
    """How much of an answer of 16 letters is the wanted one."""
    return [response.split().count("e") / 16 for response in responses]
'''


def letters_home(folder: Path, ranks: int = 1, seed: int = 1, **stage: Any) -> Path:
    """A folder with a model, prompts, a reward, and a recipe of one stage, ``ppo``."""
    letters_model(folder / "base", seed=10 + seed)
    prompts = [{"prompt": f"{one} {other}"} for one in LETTERS[:8] for other in LETTERS[8:16]]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    (folder / "rewards.py").write_text(REWARDS)
    settings = {
        "kind": "ppo",
        "start_from": "base",
        "data": {"letters": {"path": "prompts.jsonl"}},
        "validation_fraction": 0.1,
        "rewards": {"share": {"function": "rewards.py:share"}},
        "rollout": {"prompts": 64, "max_new_tokens": 16},
        "batch": {"global": 64, "micro": 64 // ranks},
        "optimizer": {
            "learning_rate": 3e-3,
            "schedule": "constant",
            "weight_decay": 0.0,
            "beta2": 0.999,
            "epsilon": 1e-5,
        },
        "steps": 40,
        "checkpoint": {"every": 100},
        **stage,
    }
    recipe = {
        "name": "letters",
        "seed": seed,
        "cluster": {"on": "local", "ranks_per_node": ranks, "device": "cpu"},
        "stages": {"ppo": settings},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder
