"""``config.json`` of Hugging Face folders, read and written without importing transformers."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmscale.errors import RecipeError
from llmscale.models.architecture import (
    FAMILIES,
    TOKEN_TYPES,
    Architecture,
    RewardArchitecture,
)
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

SCORES_TEXTS = "ForSequenceClassification"
SCORING_CLASSES = {
    "llama": "LlamaForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
}
VIRTUAL_TOKENS = ("PREFIX_TUNING", "PROMPT_TUNING")
"""PEFT's types of adapters that are tokens before the text."""

Config = dict[str, Any]

ROTARY_FAMILIES = ("llama", "qwen2", "qwen3", "mixtral")
ROTARY_KEYS = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "attention_heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "ffn_size": "intermediate_size",
    "sequence_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
}
KEYS: dict[str, dict[str, str]] = {
    "llama": {**ROTARY_KEYS, "bias": "attention_bias"},
    "qwen2": ROTARY_KEYS,
    "qwen3": ROTARY_KEYS,
    "mixtral": {
        **ROTARY_KEYS,
        "experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
        "balance_coefficient": "router_aux_loss_coef",
    },
    "gpt2": {
        "layers": "n_layer",
        "hidden_size": "n_embd",
        "attention_heads": "n_head",
        "ffn_size": "n_inner",
        "sequence_length": "n_positions",
        "norm_epsilon": "layer_norm_epsilon",
    },
    "bert": {
        "layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "attention_heads": "num_attention_heads",
        "ffn_size": "intermediate_size",
        "sequence_length": "max_position_embeddings",
        "norm_epsilon": "layer_norm_eps",
    },
    "t5": {
        "layers": "num_layers",
        "decoder_layers": "num_decoder_layers",
        "hidden_size": "d_model",
        "attention_heads": "num_heads",
        "head_size": "d_kv",
        "ffn_size": "d_ff",
        "sequence_length": "n_positions",
        "norm_epsilon": "layer_norm_epsilon",
        "relative_buckets": "relative_attention_num_buckets",
        "relative_distance": "relative_attention_max_distance",
    },
}
"""An architecture's settings by the keys of each family's ``config.json``."""

ROTARY_DEFAULTS: Config = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
DEFAULTS: dict[str, Config] = {
    "llama": {**ROTARY_DEFAULTS, "attention_bias": False},
    "qwen2": ROTARY_DEFAULTS,
    "qwen3": ROTARY_DEFAULTS,
    "mixtral": {**ROTARY_DEFAULTS, "router_aux_loss_coef": 0.001},
    "gpt2": {"n_inner": None, "layer_norm_epsilon": 1e-5},
    "bert": {"layer_norm_eps": 1e-12},
    "t5": {
        "num_decoder_layers": None,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
    },
}
"""What transformers takes where a key is missing; None is left to the architecture."""

FIXED: dict[str, Config] = {
    "llama": {"hidden_act": "silu"},
    "qwen2": {"hidden_act": "silu", "use_sliding_window": False},
    "qwen3": {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
    "mixtral": {"hidden_act": "silu", "sliding_window": None},
    "gpt2": {"activation_function": "gelu_new"},
    "bert": {
        "hidden_act": "gelu",
        "type_vocab_size": TOKEN_TYPES,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
    },
    "t5": {},
}
"""What a folder must say, if it says anything, and what is written."""

COMPLETED = {
    "key_value_heads": "groups",
    "head_size": "head",
    "ffn_size": "ffn",
    "decoder_layers": "decoders",
    "tied_embeddings": "tied",
    "bias": "biased",
}
"""Settings that an architecture completes, and under which name."""


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
        RecipeError: if the folder holds no such configuration, or one of another family, or
            if there is more to the model than its weights.
    """
    reader = _Reader(folder)
    if virtual_tokens_beside(folder):
        raise RecipeError(
            f"{folder}: the virtual tokens in adapter/ are no part of its weights, and would be "
            "lost; give the model they were trained beside"
        )
    kind = reader.config.get("model_type")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise RecipeError(
            f"{reader.path}: model_type {shown(kind)} is not supported; "
            f"give a folder of type {choices(CLASSES)}"
        )
    for key, value in FIXED[kind].items():
        reader.require(key, value)
    try:
        read = Architecture.model_validate({"family": kind, **_settings(reader, kind)})
        heads = _heads(reader.config)
        return RewardArchitecture.upon(read, heads) if heads else read
    except KeyError as error:
        cause = f"{error.args[0]} is missing"
    except ValidationError as error:
        wrong = error.errors()[0]
        cause = f"{wrong['loc'][0]} cannot be {shown(wrong['input'])}"
    except (AttributeError, TypeError):
        cause = "a value is of the wrong type"
    raise RecipeError(f"{reader.path}: {cause}; give a model's own folder")


def require_next_tokens(config: Any) -> None:
    """Checks that a configuration of transformers is of a model that goes on from a text.

    Raises:
        ValueError: if it is not.
    """
    traits = FAMILIES.get(config.model_type)
    if traits is not None and traits.objective != "causal":
        raise ValueError(f"{config.model_type} does not go on from a text")
    if any(name.endswith(SCORES_TEXTS) for name in config.architectures or ()):
        raise ValueError("it scores texts, and does not go on from one")


def virtual_tokens_beside(folder: Path) -> bool:
    """Whether a Hugging Face folder has virtual tokens in ``adapter/``, which no weight holds."""
    try:
        about = json.loads((folder / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and about.get("peft_type") in VIRTUAL_TOKENS


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
    config = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "vocab_size": vocabulary,
        "dtype": dtype,
        "tie_word_embeddings": architecture.tied,
        **FIXED[family],
    }
    for ours, theirs in KEYS[family].items():
        config[theirs] = getattr(architecture, COMPLETED.get(ours, ours))
    if family != "t5":  # which has spreads of its own
        config["initializer_range"] = architecture.initial_std
    return config | _own_form(architecture) | _scoring(architecture)


def _heads(config: Config) -> tuple[str, ...]:
    """What a folder's model scores; nothing if it predicts tokens."""
    if not any(name.endswith(SCORES_TEXTS) for name in config.get("architectures") or ()):
        return ()
    labels = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # as transformers has it
    return tuple(str(labels[number]) for number in sorted(labels, key=int))


def scoring_config(heads: tuple[str, ...]) -> Config:
    """How ``config.json`` names the heads of a model that scores texts."""
    return {
        "id2label": {str(number): name for number, name in enumerate(heads)},
        "label2id": {name: number for number, name in enumerate(heads)},
    }


def _scoring(architecture: Architecture) -> Config:
    if not architecture.scored:
        return {}
    model = SCORING_CLASSES[architecture.family]
    return {"architectures": [model], **scoring_config(architecture.scored)}


def _settings(reader: _Reader, family: str) -> Config:
    config, defaults = reader.config, DEFAULTS[family]
    own = _rotary_positions(reader, family) if family in ROTARY_FAMILIES else {}
    own |= _read_t5(reader) if family == "t5" else {}
    found = {
        ours: config.get(theirs, defaults[theirs]) if theirs in defaults else config[theirs]
        for ours, theirs in KEYS[family].items()
    }
    if family == "llama":
        reader.require("mlp_bias", found["bias"])
    return found | own


def _own_form(architecture: Architecture) -> Config:
    """What a family writes in a form of its own."""
    if architecture.family == "bert":
        return {"pad_token_id": None}  # transformers would freeze the row of its default, 0
    if architecture.family == "t5":
        return _t5(architecture)
    if architecture.family == "gpt2":
        return {}
    rope: Config = {"rope_type": "default", "rope_theta": architecture.rotary_base}
    if architecture.rotary_scaling_factor is not None:
        rope |= {"rope_type": "llama3", "factor": architecture.rotary_scaling_factor}
        rope |= LLAMA3_ROTARY
    biases = {"mlp_bias": architecture.biased} if architecture.family == "llama" else {}
    return {"rope_parameters": rope, **biases}


def _rotary_positions(reader: _Reader, family: str) -> Config:
    config = reader.config
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", "default")
    base = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    if kind == "default":
        return {"rotary_base": base}
    if (kind, family) != ("llama3", "llama"):
        offered = "default or llama3" if family == "llama" else "default"
        raise RecipeError(f"{reader.path}: rope_type {kind!r} is not {offered}")
    for key, value in LLAMA3_ROTARY.items():
        reader.require(key, value, rope)
    return {"rotary_base": base, "rotary_scaling_factor": rope["factor"]}


GATED_GELU = "gated-gelu"


def _read_t5(reader: _Reader) -> Config:
    config = reader.config
    gated = config.get("feed_forward_proj", "relu") == GATED_GELU
    if not gated:
        reader.require("feed_forward_proj", "relu")
    # transformers 5 writes tie_word_embeddings: true for models whose tables are not tied.
    tied = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
    return {"gated": gated, "tied_embeddings": tied}


def _t5(architecture: Architecture) -> Config:
    return {
        "feed_forward_proj": GATED_GELU if architecture.gated_ffn else "relu",
        "scale_decoder_outputs": architecture.tied,
    }
