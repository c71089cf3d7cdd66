"""What a policy answered, and the rows of tokens that is learned from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llmscale.data.chat import Example
from llmscale.data.prompts import Prompt
from llmscale.training.rows import RowForm, Rows


@dataclass(frozen=True)
class Answer:
    """What a policy answered.

    Attributes:
        text: without tokens that stand for no text.
        tokens: with the one that ended it, if one did.
        log_probabilities: of each token, as the rollout's own model had them.
        ended: whether the policy ended it; else it was cut off.
    """

    prompt: Prompt
    text: str
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    ended: bool

    @property
    def example(self) -> Example:
        """The whole text, of which the answer is learned."""
        tokens = (*self.prompt.tokens, *self.tokens)
        learned_n = np.arange(len(tokens)) >= len(self.prompt.tokens)
        return Example(np.array(tokens, dtype=np.int32), learned_n)


def answer_rows(answers: Sequence[Answer], form: RowForm, device: torch.device) -> Rows:
    """A row an answer, all of one length."""
    examples = [answer.example for answer in answers]
    length = form.length(max(map(len, examples)))
    return form.rows([[example] for example in examples], length, device)


def rollout_probabilities(answers: Sequence[Answer], rows: Rows) -> torch.Tensor:
    """The rollout's own log-probabilities at the places of the answers' tokens, else 0."""
    found = torch.zeros(rows.mask_bs.shape, device=rows.mask_bs.device)
    flat = [value for answer in answers for value in answer.log_probabilities]
    found[rows.mask_bs > 0] = torch.tensor(flat, device=found.device)
    return found
