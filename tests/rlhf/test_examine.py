"""What is made of an iteration's answers before a policy learns from them.

Shape legend: n answers, s places a row.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmscale.data.prompts import Prompt
from llmscale.rlhf.answers import Answer, answer_rows
from llmscale.rlhf.examine import examined
from llmscale.rlhf.lesson import Lesson
from llmscale.rlhf.scoring import Scores
from llmscale.rlhf.settings import Expectation, Kl, Rollout, Update
from llmscale.training.rows import RowForm
from llmscale.training.settings import Batch, Checkpointing

CPU = torch.device("cpu")
BETA = 0.1


def lesson_of(answers: int) -> Lesson:
    """RLOO with a penalty in the reward, and one update of all answers to one prompt."""
    return Lesson(
        algorithm="rloo",
        steps=1,
        seed=1,
        batch=Batch(**{"global": answers, "micro": 2}),
        rollout=Rollout(prompts=1, answers=answers, max_new_tokens=4),
        kl=Kl(coefficient=BETA),
        expectation=Expectation(),
        update=Update(),
        checkpointing=Checkpointing(every=1),
        samples_every=1,
    )


def test_before_an_only_update_the_policy_is_not_asked_and_penalties_are_of_what_answered() -> None:
    torch.manual_seed(3)
    lengths = (1, 4, 2)
    answers = [
        Answer(Prompt("a", (5, 6)), "", (7,) * length, tuple((-torch.rand(length)).tolist()), True)
        for length in lengths
    ]
    form = RowForm(padding=0, room=8, multiple=1)
    reference_ns = -torch.rand(answer_rows(answers, form, CPU).tokens_bs.shape)
    reference = SimpleNamespace(log_probabilities=lambda rows, micro_batch: reference_ns)
    roles: Any = SimpleNamespace(
        policy=SimpleNamespace(device=CPU), reference=reference, critic=None
    )
    scores = Scores([1.0, 0.0, 0.5], {})
    experience, _, figures = examined(lesson_of(3), roles, form, answers, scores, BETA)
    apart = [
        sum(answer.log_probabilities) - reference_ns[number, 1 : 1 + length].sum().item()
        for number, (answer, length) in enumerate(zip(answers, lengths, strict=True))
    ]
    assert experience.sampled_ns is None
    assert figures["kl"] == pytest.approx(sum(apart) / 3, abs=1e-6)
    worth = [score - BETA * own for score, own in zip(scores.total_n, apart, strict=True)]
    for number, own in enumerate(worth):
        others = [other for place, other in enumerate(worth) if place != number]
        expected = own - sum(others) / 2
        learned_s = experience.advantages_ns[number][experience.mask_ns[number]]
        torch.testing.assert_close(learned_s, torch.full_like(learned_s, expected))
