"""What the DeepSpeed engine trains: a model of transformers, from a Hugging Face folder."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from llmscale.errors import RecipeError
from llmscale.models.architecture import Architecture
from llmscale.models.huggingface_config import scoring_config
from llmscale.training.deepspeed_setup import deepspeed, deepspeed_settings
from llmscale.training.settings import Recompute, Zero

MODEL_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "spans": "AutoModelForSeq2SeqLM",
    "scores": "AutoModelForSequenceClassification",
}
"""transformers' class for each objective, and for models that score texts."""


def loaded_model(
    folder: Path,
    architecture: Architecture,
    head: Tensor | None,
    zero: Zero,
    recompute: Recompute,
    device: str,
    quantized: dict[str, Any] | None = None,
) -> nn.Module:
    """A Hugging Face folder's model in fp32; under ZeRO 3, but for T5, never whole on a rank.

    Args:
        head: of a model that scores texts, ``[heads, hidden]``.
        quantized: how transformers is to quantize it while it loads.

    Raises:
        RecipeError: if transformers cannot load it.
    """
    from transformers.integrations import HfDeepSpeedConfig

    kind = "scores" if architecture.scored else architecture.traits.objective
    model_class = getattr(transformers, MODEL_CLASSES[kind])
    # transformers partitions while such an object lives; T5's untied tables it would tie then
    partitioned = zero.stage == 3 and architecture.traits.objective != "spans"
    partitioning = HfDeepSpeedConfig(deepspeed_settings(zero, 0.0)) if partitioned else None
    local: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        _leave_out_dropout(config)
        if architecture.scored:
            config.num_labels = len(architecture.scored)
            config.update(scoring_config(architecture.scored))
        model: nn.Module = model_class.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            **local,
            **(quantized or {}),
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        cause = str(error).strip().splitlines()[0]
        raise RecipeError(f"{folder}: cannot be loaded: {cause}") from None
    finally:
        del partitioning
    _let_padding_learn(model)
    if head is not None:
        _let_score_every_token(model, head, partitioned)
    if recompute == "full":
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    return model.train() if partitioned or quantized else model.to(device).train()


def _let_padding_learn(model: Any) -> None:
    """Lets the padding token's embedding learn: many models end their texts by the same token.

    Where it only fills rows up, no loss depends on it.
    """
    model.get_input_embeddings().padding_idx = None


def _let_score_every_token(model: Any, head: Tensor, partitioned: bool) -> None:
    """Sets the head, and lets the model say its scores at all tokens, not at the last alone."""
    whole: Any = nullcontext()
    if partitioned:
        whole = deepspeed.zero.GatheredParameters([model.score.weight], modifier_rank=0)
    with whole, torch.no_grad():
        model.score.weight.copy_(head)
    backbone = getattr(model, model.base_model_prefix)

    def forward(**inputs: Any) -> Any:
        hidden_bsh = backbone(**inputs).last_hidden_state
        return SequenceClassifierOutput(logits=model.score(hidden_bsh))

    model.forward = forward


def _leave_out_dropout(config: Any) -> None:
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(config, name, 0.0)
