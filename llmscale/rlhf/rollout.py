"""Answers of a policy, by transformers' generation on every rank.

Shape legend: b answers, s tokens of the longest prompt.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessorList

from llmscale.data.prompts import Prompt
from llmscale.errors import StageError
from llmscale.rlhf.answers import Answer
from llmscale.rlhf.sampling import NumberedSampler


@dataclass(frozen=True)
class AnswerForm:
    """How answers are sampled.

    Attributes:
        most: tokens an answer has at most.
        ends: tokens that end one.
        batch: answers that a rank generates at a time.
    """

    temperature: float
    most: int
    ends: tuple[int, ...]
    padding: int
    batch: int


class TransformersRollout:
    """A copy of the policy on every rank, in transformers' form, which shares the work.

    Args:
        folder: whose ``config.json`` says what the model is; its weights are not read.
        tokenizer: the policy's.
    """

    def __init__(
        self, folder: Path, tokenizer: Any, form: AnswerForm, dtype: torch.dtype, device: str
    ) -> None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        self.model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.model.to(device).eval().requires_grad_(False)
        self._tokenizer, self._form = tokenizer, form

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        found: torch.device = self.model.device
        return found

    @torch.no_grad()
    def synchronize(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes the policy's weights, which every rank is given one at a time; collective.

        Raises:
            StageError: if a rank's copy then is not the policy, bit for bit.
        """
        own = dict(self.model.named_parameters(remove_duplicate=False))
        given, taken, missing = hashlib.blake2b(), hashlib.blake2b(), set(own)
        for name, weight in weights:
            own[name].copy_(weight)
            given.update(checksum(weight.to(own[name].dtype)))
            taken.update(checksum(own[name]))
            missing.discard(name)
        tied = set(self.model.all_tied_weights_keys)
        sums = [given.hexdigest(), taken.hexdigest(), *sorted(missing - tied)]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, sums)
        first = everyone[0][0]
        for rank, found in enumerate(everyone):
            if found != [first, first]:
                raise StageError(f"rank {rank}: the rollout's weights are not the policy's")

    def answers(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> list[Answer]:
        """An answer to each prompt, sampled by its key; all of them on every rank; collective."""
        ranks, rank = dist.get_world_size(), dist.get_rank()
        by_length = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].tokens))
        own = by_length[rank::ranks]
        found: dict[int, Answer] = {}
        for first in range(0, len(own), self._form.batch):
            numbers = own[first : first + self._form.batch]
            made = self._generated([prompts[n] for n in numbers], [keys[n] for n in numbers])
            found.update(zip(numbers, made, strict=True))
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, found)
        whole = {number: answer for part in everyone for number, answer in part.items()}
        return [whole[number] for number in range(len(prompts))]

    @torch.no_grad()
    def _generated(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> list[Answer]:
        form, device = self._form, self.model.device
        longest = max(len(prompt.tokens) for prompt in prompts)
        tokens_bs = torch.full((len(prompts), longest), form.padding)
        mask_bs = torch.zeros_like(tokens_bs)
        for row, prompt in enumerate(prompts):
            tokens_bs[row, longest - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
            mask_bs[row, longest - len(prompt.tokens) :] = 1
        sampler = NumberedSampler(keys, form.temperature, device)
        output = self.model.generate(
            tokens_bs.to(device),
            attention_mask=mask_bs.to(device),
            max_new_tokens=form.most,
            do_sample=False,
            logits_processor=LogitsProcessorList([sampler]),
            eos_token_id=list(form.ends),
            pad_token_id=form.padding,
        )[:, longest:].cpu()
        known_bt = torch.stack(sampler.log_probabilities, 1).cpu()
        return [
            self._answer(prompt, tokens.tolist(), known.tolist())
            for prompt, tokens, known in zip(prompts, output, known_bt, strict=True)
        ]

    def _answer(self, prompt: Prompt, tokens: list[int], known: list[float]) -> Answer:
        """What comes behind the first token that ends it is padding."""
        end = next((at for at, token in enumerate(tokens) if token in self._form.ends), None)
        if end is not None:
            tokens = tokens[: end + 1]
        before = self._text(prompt.tokens)
        text = self._text((*prompt.tokens, *tokens)).removeprefix(before)
        return Answer(prompt, text, tuple(tokens), tuple(known[: len(tokens)]), end is not None)

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def checksum(tensor: Tensor) -> bytes:
    """Eight bytes of a tensor's bits, made where it is: the exclusive or of its numbers'."""
    bits = torch.hash_tensor(tensor.detach()).view(torch.int64)
    return int(bits).to_bytes(8, "big", signed=True)
