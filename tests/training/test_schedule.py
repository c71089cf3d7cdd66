"""Learning rates, against transformers' own schedules."""

import pytest
import torch
from transformers import get_scheduler

from llmscale.training.schedule import learning_rate
from llmscale.training.settings import Optimizer

STEPS, WARMUP, PEAK = 100, 10, 2e-3


def theirs(name: str, **specific: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=WARMUP,
        num_training_steps=STEPS,
        scheduler_specific_kwargs=specific,
    )
    rates = []
    for _ in range(STEPS):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_schedules_equal_those_of_transformers(name: str) -> None:
    settings = Optimizer(learning_rate=PEAK, schedule=name, warmup_steps=WARMUP)
    ours = [learning_rate(step, STEPS, settings) for step in range(STEPS)]
    expected = theirs("constant_with_warmup" if name == "constant" else name)
    # transformers starts its warm-up at zero, one step earlier: theirs[n - 1] is our step n.
    assert ours[:WARMUP] == pytest.approx(expected[:WARMUP])
    assert ours[WARMUP + 1 :] == pytest.approx(expected[WARMUP:-1])


def test_warmup_stable_decay_equals_that_of_transformers() -> None:
    settings = Optimizer(learning_rate=PEAK, schedule="wsd", warmup_steps=WARMUP, decay_steps=20)
    ours = [learning_rate(step, STEPS, settings) for step in range(STEPS)]
    expected = theirs("warmup_stable_decay", num_decay_steps=20, decay_type="linear")
    assert ours[WARMUP + 1 :] == pytest.approx(expected[WARMUP:-1])


def test_every_schedule_ends_above_its_minimum_and_stays_below_its_peak() -> None:
    for name in ("cosine", "linear", "constant", "wsd"):
        settings = Optimizer(
            learning_rate=PEAK, minimum_learning_rate=1e-4, schedule=name, warmup_steps=WARMUP
        )
        rates = [learning_rate(step, STEPS, settings) for step in range(STEPS)]
        assert max(rates) == pytest.approx(PEAK)
        assert min(rates[WARMUP:]) >= 1e-4
