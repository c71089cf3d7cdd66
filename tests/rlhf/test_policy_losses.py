"""Losses of tokens and estimates of a divergence, against their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from llmscale.rlhf.policy_losses import (
    adapted_coefficient,
    clipped_policy_loss,
    divergence,
    entropy_loss,
    value_loss,
)

logs = st.floats(-2, 2)
gains = st.floats(-3, 3)


@settings(deadline=None)
@given(logs, gains)
def test_a_policy_gains_nothing_by_moving_further_than_the_clip(log: float, gain: float) -> None:
    got = clipped_policy_loss(torch.tensor(log), torch.tensor(gain), 0.2).item()
    ratio = math.exp(log)
    wanted = -min(gain * ratio, gain * min(max(ratio, 0.8), 1.2))
    assert got == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@settings(deadline=None)
@given(logs, gains)
def test_the_dual_clip_bounds_the_loss_of_bad_tokens_alone(log: float, gain: float) -> None:
    plain = clipped_policy_loss(torch.tensor(log), torch.tensor(gain), 0.2).item()
    got = clipped_policy_loss(torch.tensor(log), torch.tensor(gain), 0.2, 3.0).item()
    wanted = min(plain, -3.0 * gain) if gain < 0 else plain
    assert got == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@settings(deadline=None)
@given(gains, gains, gains)
def test_a_value_that_moves_too_far_is_as_wrong_as_it_is_or_as_the_clip_lets_it_be(
    value: float, sampled: float, wanted: float
) -> None:
    got = value_loss(*map(torch.tensor, (value, sampled, wanted)), 0.2).item()
    near = min(max(value, sampled - 0.2), sampled + 0.2)
    expected = 0.5 * max((value - wanted) ** 2, (near - wanted) ** 2)
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_estimates_have_the_exact_divergence_as_their_mean_over_a_vocabulary(
    estimator: str,
) -> None:
    torch.manual_seed(0)
    policy, reference = (torch.randn(6).log_softmax(0) for _ in range(2))
    estimates = divergence(policy - reference, estimator)  # type: ignore[arg-type]
    exact = kl_divergence(Categorical(logits=policy), Categorical(logits=reference))
    torch.testing.assert_close((policy.exp() * estimates).sum(), exact)


def test_the_entropy_s_gradient_is_the_exact_one_in_the_mean_over_a_vocabulary() -> None:
    torch.manual_seed(0)
    sampled = torch.randn(6).log_softmax(0)
    logits = torch.randn(6, requires_grad=True)
    (exact,) = torch.autograd.grad(-Categorical(logits=logits).entropy(), logits)
    known = logits.log_softmax(0)
    estimates = entropy_loss(known, (known - sampled).detach())
    (found,) = torch.autograd.grad((sampled.exp() * estimates).sum(), logits)
    torch.testing.assert_close(found, exact)


def test_k2_is_near_the_exact_divergence_of_distributions_that_are_near() -> None:
    torch.manual_seed(0)
    policy = torch.randn(6).log_softmax(0)
    reference = (policy + 0.01 * torch.randn(6)).log_softmax(0)
    mean = (policy.exp() * divergence(policy - reference, "k2")).sum()
    exact = kl_divergence(Categorical(logits=policy), Categorical(logits=reference))
    torch.testing.assert_close(mean, exact, rtol=0.05, atol=0)


@settings(deadline=None)
@given(st.floats(-5, 5), st.sampled_from(["k2", "k3"]))
def test_k2_and_k3_are_never_negative(log: float, estimator: str) -> None:
    assert divergence(torch.tensor(log), estimator) >= 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kl", "factor"), [(12.0, 1 + 0.2 * 0.01), (6.3, 1 + 0.05 * 0.01), (0.0, 1 - 0.2 * 0.01)]
)
def test_the_coefficient_rises_above_the_target_and_falls_below_it(
    kl: float, factor: float
) -> None:
    assert adapted_coefficient(0.5, kl, 6.0, 100, 10_000) == pytest.approx(0.5 * factor)
