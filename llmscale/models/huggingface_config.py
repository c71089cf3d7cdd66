"""``config.json`` of Hugging Face folders, read and written without importing transformers."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmscale.errors import RecipeError
from llmscale.models.architecture import TOKEN_TYPES, Architecture
from llmscale.settings import choices, shown

LLAMA3_ROTARY = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The constants of Llama 3's stretch of rotary frequencies (Dubey et al. 2024), but its factor."""

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForMaskedLM",
    "t5": "T5ForConditionalGeneration",
}

Config = dict[str, Any]


class _Reader:
    """One folder's configuration, and complaints that name it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.json"
        try:
            self.config: Config = dict(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            cause = error.strerror if isinstance(error, OSError) else "is no JSON mapping"
            raise RecipeError(f"{self.path}: {cause}; give a Hugging Face folder") from None

    def require(self, key: str, value: object, config: Config | None = None) -> None:
        """Refuses a key that says something else."""
        config = self.config if config is None else config
        if config.get(key, value) != value:
            raise RecipeError(
                f"{self.path}: {key} {shown(config[key])} is not supported; "
                f"give a folder whose {key} is {shown(value)}"
            )


def read_architecture(folder: Path) -> Architecture:
    """The architecture of a Hugging Face folder.

    Raises:
        RecipeError: if the folder holds no such configuration, or one of another family.
    """
    reader = _Reader(folder)
    kind = reader.config.get("model_type")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise RecipeError(
            f"{reader.path}: model_type {shown(kind)} is not supported; "
            f"give a folder of type {choices(CLASSES)}"
        )
    read = {"gpt2": _read_gpt2, "bert": _read_bert, "t5": _read_t5}.get(kind, _read_llama)
    try:
        return Architecture.model_validate({"family": kind, **read(reader, reader.config)})
    except KeyError as error:
        cause = f"{error.args[0]} is missing"
    except ValidationError as error:
        wrong = error.errors()[0]
        cause = f"{wrong['loc'][0]} cannot be {shown(wrong['input'])}"
    except (AttributeError, TypeError):
        cause = "a value is of the wrong type"
    raise RecipeError(f"{reader.path}: {cause}; give a model's own folder")


def read_vocabulary(folder: Path) -> int:
    """The size of a Hugging Face model's vocabulary.

    Raises:
        RecipeError: if the folder's ``config.json`` does not say.
    """
    size = _Reader(folder).config.get("vocab_size")
    if not isinstance(size, int):
        raise RecipeError(f"{folder}/config.json: vocab_size is missing; give a model's folder")
    return size


def write_config(architecture: Architecture, vocabulary: int, dtype: str) -> Config:
    """``config.json`` as transformers reads it."""
    family = architecture.family
    write = {"gpt2": _gpt2, "bert": _bert, "t5": _t5}.get(family, _llama)
    return {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "vocab_size": vocabulary,
        "dtype": dtype,
        "tie_word_embeddings": architecture.tied,
        **write(architecture),
    }


def _read_llama(reader: _Reader, config: Config) -> Config:
    """Llama, Qwen2, Qwen3 and Mixtral."""
    family = config["model_type"]
    reader.require("hidden_act", "silu")
    if family == "llama":
        reader.require("mlp_bias", config.get("attention_bias", False))
    elif family == "qwen3":
        reader.require("attention_bias", False)
    if config.get("use_sliding_window", family == "mixtral"):
        reader.require("sliding_window", None)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", "default")
    if kind != "default" and (kind, family) != ("llama3", "llama"):
        offered = "default or llama3" if family == "llama" else "default"
        raise RecipeError(f"{reader.path}: rope_type {kind!r} is not {offered}")
    settings = {
        "layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "attention_heads": config["num_attention_heads"],
        "key_value_heads": config.get("num_key_value_heads"),
        "head_size": config.get("head_dim"),
        "ffn_size": config["intermediate_size"],
        "sequence_length": config["max_position_embeddings"],
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "tied_embeddings": config.get("tie_word_embeddings", False),
        "rotary_base": rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
    }
    if family == "llama":
        settings["bias"] = config.get("attention_bias", False)
    if family == "mixtral":
        settings["experts"] = config["num_local_experts"]
        settings["experts_per_token"] = config["num_experts_per_tok"]
        settings["balance_coefficient"] = config.get("router_aux_loss_coef", 0.001)
    if kind == "llama3":
        settings["rotary_scaling_factor"] = rope["factor"]
        for key, value in LLAMA3_ROTARY.items():
            reader.require(key, value, rope)
    return settings


def _llama(a: Architecture) -> Config:
    rope: Config = {"rope_type": "default", "rope_theta": a.rotary_base}
    if a.rotary_scaling_factor is not None:
        rope = {**rope, "rope_type": "llama3", "factor": a.rotary_scaling_factor, **LLAMA3_ROTARY}
    own: dict[str, Config] = {
        "llama": {"attention_bias": a.biased, "mlp_bias": a.biased},
        "qwen2": {"use_sliding_window": False},
        "qwen3": {"attention_bias": False, "use_sliding_window": False},
        "mixtral": {
            "num_local_experts": a.experts,
            "num_experts_per_tok": a.experts_per_token,
            "router_aux_loss_coef": a.balance_coefficient,
            "sliding_window": None,
        },
    }
    return {
        "num_hidden_layers": a.layers,
        "hidden_size": a.hidden_size,
        "num_attention_heads": a.attention_heads,
        "num_key_value_heads": a.groups,
        "head_dim": a.head,
        "intermediate_size": a.ffn,
        "max_position_embeddings": a.sequence_length,
        "rms_norm_eps": a.norm_epsilon,
        "initializer_range": a.initial_std,
        "hidden_act": "silu",
        "rope_parameters": rope,
        **own[a.family],
    }


def _read_gpt2(reader: _Reader, config: Config) -> Config:
    reader.require("activation_function", "gelu_new")
    return {
        "layers": config["n_layer"],
        "hidden_size": config["n_embd"],
        "attention_heads": config["n_head"],
        "ffn_size": config.get("n_inner") or 4 * config["n_embd"],
        "sequence_length": config["n_positions"],
        "norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
    }


def _gpt2(a: Architecture) -> Config:
    return {
        "n_layer": a.layers,
        "n_embd": a.hidden_size,
        "n_head": a.attention_heads,
        "n_inner": a.ffn,
        "n_positions": a.sequence_length,
        "layer_norm_epsilon": a.norm_epsilon,
        "initializer_range": a.initial_std,
        "activation_function": "gelu_new",
    }


def _read_bert(reader: _Reader, config: Config) -> Config:
    reader.require("hidden_act", "gelu")
    reader.require("type_vocab_size", TOKEN_TYPES)
    reader.require("position_embedding_type", "absolute")
    reader.require("tie_word_embeddings", True)
    return {
        "layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "attention_heads": config["num_attention_heads"],
        "ffn_size": config["intermediate_size"],
        "sequence_length": config["max_position_embeddings"],
        "norm_epsilon": config.get("layer_norm_eps", 1e-12),
    }


def _bert(a: Architecture) -> Config:
    return {
        "num_hidden_layers": a.layers,
        "hidden_size": a.hidden_size,
        "num_attention_heads": a.attention_heads,
        "intermediate_size": a.ffn,
        "max_position_embeddings": a.sequence_length,
        "type_vocab_size": TOKEN_TYPES,
        "layer_norm_eps": a.norm_epsilon,
        "initializer_range": a.initial_std,
        "hidden_act": "gelu",
        "pad_token_id": None,
    }


GATED_GELU = "gated-gelu"


def _read_t5(reader: _Reader, config: Config) -> Config:
    gated = config.get("feed_forward_proj", "relu") == GATED_GELU
    if not gated:
        reader.require("feed_forward_proj", "relu")
    return {
        "layers": config["num_layers"],
        "decoder_layers": config.get("num_decoder_layers") or config["num_layers"],
        "hidden_size": config["d_model"],
        "attention_heads": config["num_heads"],
        "head_size": config["d_kv"],
        "ffn_size": config["d_ff"],
        "sequence_length": config.get("n_positions", 512),
        "norm_epsilon": config.get("layer_norm_epsilon", 1e-6),
        # transformers 5 writes tie_word_embeddings: true for models whose tables are not tied.
        "tied_embeddings": config.get(
            "scale_decoder_outputs", config.get("tie_word_embeddings", True)
        ),
        "gated": gated,
        "relative_buckets": config.get("relative_attention_num_buckets", 32),
        "relative_distance": config.get("relative_attention_max_distance", 128),
    }


def _t5(a: Architecture) -> Config:
    return {
        "num_layers": a.layers,
        "num_decoder_layers": a.decoders,
        "d_model": a.hidden_size,
        "num_heads": a.attention_heads,
        "d_kv": a.head,
        "d_ff": a.ffn,
        "n_positions": a.sequence_length,
        "layer_norm_epsilon": a.norm_epsilon,
        "feed_forward_proj": GATED_GELU if a.gated_ffn else "relu",
        "scale_decoder_outputs": a.tied,
        "relative_attention_num_buckets": a.relative_buckets,
        "relative_attention_max_distance": a.relative_distance,
    }
