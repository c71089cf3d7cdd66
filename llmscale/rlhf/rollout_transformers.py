"""Answers by transformers' generation, on any device.

Shape legend: b answers, s tokens of the longest prompt, t tokens of an answer.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessorList

from llmscale.data.prompts import Prompt
from llmscale.rlhf.rollout import AnswerForm, Sampled, checksum
from llmscale.rlhf.sampling import NumberedSampler


class TransformersEngine:
    """A copy of the policy in transformers' form.

    Args:
        folder: whose ``config.json`` says what the model is; its weights are not read.
    """

    def __init__(self, folder: Path, form: AnswerForm, dtype: torch.dtype, device: str) -> None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        self.model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.model.to(device).eval().requires_grad_(False)
        self.device: torch.device = self.model.device
        self._form = form

    @torch.no_grad()
    def take(self, weights: Iterator[tuple[str, Tensor]]) -> list[str]:
        """Takes the policy's weights; names of those that it does not have bit for bit."""
        own = dict(self.model.named_parameters(remove_duplicate=False))
        missing, wrong = set(own) - set(self.model.all_tied_weights_keys), []
        for name, weight in weights:
            own[name].copy_(weight)
            if checksum(own[name]) != checksum(weight.to(own[name].dtype)):
                wrong.append(name)
            missing.discard(name)
        return [*wrong, *sorted(missing)]

    def sampled(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> list[Sampled]:
        """What follows each prompt, by its key alone, some prompts at a time."""
        found: list[Sampled] = []
        for first in range(0, len(prompts), self._form.batch):
            some = slice(first, first + self._form.batch)
            found += self._generated(prompts[some], keys[some])
        return found

    @torch.inference_mode()
    def _generated(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> list[Sampled]:
        form = self._form
        longest = max(len(prompt.tokens) for prompt in prompts)
        tokens_bs = torch.full((len(prompts), longest), form.padding)
        mask_bs = torch.zeros_like(tokens_bs)
        for row, prompt in enumerate(prompts):
            tokens_bs[row, longest - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
            mask_bs[row, longest - len(prompt.tokens) :] = 1
        sampler = NumberedSampler(keys, form.temperature, form.most, self.device)
        output_bt = self.model.generate(
            tokens_bs.to(self.device),
            attention_mask=mask_bs.to(self.device),
            max_new_tokens=form.most,
            do_sample=False,
            logits_processor=LogitsProcessorList([sampler]),
            eos_token_id=list(form.ends),
            pad_token_id=form.padding,
        )[:, longest:]
        known_bt = torch.stack(sampler.log_probabilities, 1)
        return [
            Sampled(tokens, known)
            for tokens, known in zip(output_bt.tolist(), known_bt.tolist(), strict=True)
        ]
