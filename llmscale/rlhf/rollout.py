"""Answers of a policy, by copies of it that share the work."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from llmscale.data.prompts import Prompt
from llmscale.errors import StageError
from llmscale.rlhf.answers import Answer


@dataclass(frozen=True)
class AnswerForm:
    """How answers are sampled.

    Attributes:
        most: tokens an answer has at most.
        ends: tokens that end one.
        batch: answers that a rank generates at a time.
        length: tokens that a prompt and its answer have at most.
    """

    temperature: float
    most: int
    ends: tuple[int, ...]
    padding: int
    batch: int
    length: int


@dataclass(frozen=True)
class Sampled:
    """Tokens that follow a prompt, and what the sampling model made of each."""

    tokens: Sequence[int]
    log_probabilities: Sequence[float]


class AnswerEngine(Protocol):
    """One rank's whole copy of the policy, which generates."""

    device: torch.device

    def take(self, weights: Iterator[tuple[str, Tensor]]) -> list[str]:
        """Takes the policy's weights; names of those that it does not have as given."""

    def sampled(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> list[Sampled]:
        """What follows each prompt, by its key alone; tokens behind an end do not count."""


class SharedRollout:
    """Copies of the policy on every rank, which share the prompts.

    Args:
        tokenizer: the policy's.
    """

    def __init__(self, engine: AnswerEngine, tokenizer: Any, form: AnswerForm) -> None:
        self._engine, self._tokenizer, self._form = engine, tokenizer, form

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self._engine.device

    def synchronize(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes the policy's weights, which every rank is given one at a time; collective.

        Raises:
            StageError: if a rank was given others than the first, or its engine did not take one.
        """
        given = hashlib.blake2b()

        def seen() -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights:
                given.update(name.encode() + checksum(weight))
                yield name, weight

        wrong = self._engine.take(seen())
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (given.hexdigest(), wrong))
        for rank, (found, differing) in enumerate(everyone):
            if differing or found != everyone[0][0]:
                names = f" ({', '.join(differing[:3])})" if differing else ""
                raise StageError(f"rank {rank}: the rollout's weights are not the policy's{names}")

    def answers(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> list[Answer]:
        """An answer to each prompt, sampled by its key; all of them on every rank; collective."""
        ranks, rank = dist.get_world_size(), dist.get_rank()
        by_length = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].tokens))
        own = by_length[rank::ranks]
        sampled = self._engine.sampled([prompts[n] for n in own], [keys[n] for n in own])
        made = [self._answer(prompts[n], one) for n, one in zip(own, sampled, strict=True)]
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, dict(zip(own, made, strict=True)))
        whole = {number: answer for part in everyone for number, answer in part.items()}
        return [whole[number] for number in range(len(prompts))]

    def _answer(self, prompt: Prompt, sampled: Sampled) -> Answer:
        """What comes behind the first token that ends it is left out."""
        tokens, known = tuple(sampled.tokens), tuple(sampled.log_probabilities)
        end = next((at for at, token in enumerate(tokens) if token in self._form.ends), None)
        if end is not None:
            tokens, known = tokens[: end + 1], known[: end + 1]
        before = self._text(prompt.tokens)
        text = self._text((*prompt.tokens, *tokens)).removeprefix(before)
        return Answer(prompt, text, tokens, known, end is not None)

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def checksum(tensor: Tensor) -> bytes:
    """Eight bytes of a tensor's bits, made where it is: the exclusive or of its numbers'."""
    bits = torch.hash_tensor(tensor.detach()).view(torch.int64)
    return int(bits).to_bytes(8, "big", signed=True)
