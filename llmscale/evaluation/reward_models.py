"""Scores of texts by a reward model, or by any decoder of transformers that classifies texts.

Shape legend: t texts, k heads.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, PositiveFloat, ValidationError
from safetensors import SafetensorError

import llmscale.quiet  # noqa: F401
from llmscale.artifacts import read_json, write_json
from llmscale.data.chat import encoded_conversation, encoded_text, own_template
from llmscale.data.conversations import Turn
from llmscale.data.tokenizer import load_tokenizer
from llmscale.errors import RecipeError
from llmscale.models.quantized import require_packages_of

SCORES_FILE = "score_normalization.json"
"""In a reward model's folder: mean and standard deviation of each head's scores."""
TOKENS_A_PASS = 4096


class Normalization(BaseModel):
    """A head's scores over reference texts."""

    mean: float
    standard_deviation: PositiveFloat


def write_normalizations(file: Path, heads: Mapping[str, Normalization]) -> None:
    """Writes what ``RewardModel`` subtracts and divides by."""
    write_json(file, {head: own.model_dump() for head, own in heads.items()})


class RewardModel:
    """Scores texts, whatever stands beside them in a batch.

    Raises:
        MachineError: if it needs a package that is missing.
        RecipeError: if the folder holds no model that scores texts.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import AutoModelForSequenceClassification
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        config = read_json(folder / "config.json") or {}
        if not any("SequenceClassification" in name for name in config.get("architectures") or ()):
            raise RecipeError(
                f"{folder}: is no model that scores texts; give a stage of kind reward, or a "
                "folder of a sequence classifier"
            )
        try:
            require_packages_of(folder)
            self.model: Any = AutoModelForSequenceClassification.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True, use_safetensors=True
            )
            self.tokenizer: Any = load_tokenizer(folder)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            cause = str(error).strip().splitlines()[0]
            raise RecipeError(f"{folder}: cannot be loaded: {cause}") from None
        if not hasattr(self.model, "score"):
            kind = self.model.config.model_type
            raise RecipeError(f"{folder}: {kind} is no decoder; give a stage of kind reward")
        self.model.to(device).eval()
        labels = self.model.config.id2label
        self.heads = tuple(str(labels[number]) for number in sorted(labels))
        self._mean_k, self._spread_k = _normalization(folder, self.heads)

    def tokens(self, prompt: str, response: str) -> list[int]:
        """A prompt and its response as the model was taught; a response alone, if it is empty."""
        template = own_template(self.tokenizer)
        if not prompt or template is None:
            return encoded_text(prompt + response, self.tokenizer).tokens_n.tolist()
        turns = (Turn("user", prompt), Turn("assistant", response))
        return encoded_conversation(turns, self.tokenizer, template).tokens_n.tolist()

    @torch.no_grad()
    def scores(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Normalized scores ``[t, k]`` of texts as tokens."""
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        found = np.zeros((len(texts), len(self.heads)))
        while order:
            longest = len(texts[order[-1]])
            rows = [order.pop() for _ in range(min(len(order), max(1, TOKENS_A_PASS // longest)))]
            found[rows] = self._scored([texts[row] for row in rows], longest)
        return (found - self._mean_k) / self._spread_k

    def _scored(self, texts: Sequence[Sequence[int]], longest: int) -> np.ndarray:
        """Right padding is seen by no token before it; which token is the last is said."""
        device = self.model.device
        tokens_ts = torch.zeros((len(texts), longest), dtype=torch.int64)
        mask_ts = torch.zeros_like(tokens_ts)
        for row, text in enumerate(texts):
            tokens_ts[row, : len(text)] = torch.tensor(text)
            mask_ts[row, : len(text)] = 1
        backbone = getattr(self.model, self.model.base_model_prefix)
        inputs = {"input_ids": tokens_ts.to(device), "attention_mask": mask_ts.to(device)}
        hidden_tsh = backbone(**inputs).last_hidden_state
        last_t = mask_ts.sum(1) - 1
        scores_tk = self.model.score(hidden_tsh[torch.arange(len(texts)), last_t.to(device)])
        return scores_tk.double().cpu().numpy()


def _normalization(folder: Path, heads: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each head's scores; 0 and 1 where the folder has none."""
    file = folder / SCORES_FILE
    if not file.exists():
        return np.zeros(len(heads)), np.ones(len(heads))
    try:
        known = {head: Normalization.model_validate(read_json(file)[head]) for head in heads}
    except (KeyError, TypeError, ValidationError):
        raise RecipeError(f"{file}: does not say mean and standard_deviation of {heads}") from None
    mean_k = np.array([known[head].mean for head in heads])
    return mean_k, np.array([known[head].standard_deviation for head in heads])
