"""What answers and tokens are worth above expectation, against brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.rlhf.advantages import (
    generalized_advantages,
    group_relative,
    last_places,
    leave_one_out,
    token_rewards,
    whitened,
)

lengths = st.lists(st.integers(1, 5), min_size=1, max_size=4)
factors = st.floats(0.1, 1.0)


def masked_rows(found: list[int], gap: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Random rewards and values; row n has so many places that count, from its own start on."""
    generator = torch.Generator().manual_seed(seed)
    mask_ns = torch.zeros(len(found), max(found) + gap + 2, dtype=torch.bool)
    for row, length in enumerate(found):
        mask_ns[row, gap : gap + length] = True
    shape = mask_ns.shape
    rewards_ns = torch.randn(shape, generator=generator, dtype=torch.float64)
    values_ns = torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.where(mask_ns, rewards_ns, 0.0), values_ns, mask_ns


def by_definition(
    rewards: list[float], values: list[float], discount: float, smoothing: float
) -> list[float]:
    """Equation 16 of Schulman et al. 2016, as a sum over what follows."""
    following = [*values[1:], 0.0]
    changes = [r + discount * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    return [
        sum((discount * smoothing) ** k * change for k, change in enumerate(changes[at:]))
        for at in range(len(changes))
    ]


@settings(deadline=None)
@given(lengths, st.integers(0, 3), st.integers(0, 99), factors, factors)
def test_advantages_are_the_discounted_sum_of_what_follows_in_the_answer(
    found: list[int], gap: int, seed: int, discount: float, smoothing: float
) -> None:
    rewards_ns, values_ns, mask_ns = masked_rows(found, gap, seed)
    got_ns = generalized_advantages(rewards_ns, values_ns, mask_ns, discount, smoothing)
    for row, own in enumerate(mask_ns):
        wanted = by_definition(
            rewards_ns[row, own].tolist(), values_ns[row, own].tolist(), discount, smoothing
        )
        torch.testing.assert_close(got_ns[row, own], torch.tensor(wanted, dtype=torch.float64))
    assert (got_ns[~mask_ns] == 0).all()


@settings(deadline=None)
@given(lengths, st.integers(0, 3), st.integers(0, 99))
def test_what_stands_at_masked_places_changes_no_advantage(
    found: list[int], gap: int, seed: int
) -> None:
    rewards_ns, values_ns, mask_ns = masked_rows(found, gap, seed)
    spoilt_ns = torch.where(mask_ns, values_ns, math.nan)
    clean = generalized_advantages(rewards_ns, values_ns, mask_ns, 0.9, 0.8)
    spoilt = generalized_advantages(rewards_ns, spoilt_ns, mask_ns, 0.9, 0.8)
    torch.testing.assert_close(spoilt, clean, rtol=0, atol=0)


def test_the_score_goes_to_the_last_token_of_the_answer_and_penalties_to_each() -> None:
    mask_ns = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    penalties_ns = torch.tensor([[9.0, 0.25, 0.5, math.nan], [1.0, 1.0, 1.0, 1.0]])
    rewards_ns = token_rewards(torch.tensor([10.0, -2.0]), penalties_ns, mask_ns)
    assert rewards_ns.tolist() == [[0, -0.25, 9.5, 0], [-1, -1, -1, -3]]
    assert last_places(mask_ns).tolist() == [2, 3]


@pytest.mark.parametrize("keep_mean", [False, True])
def test_whitening_uses_the_biased_variance_of_what_is_not_masked(keep_mean: bool) -> None:
    values = torch.tensor([[1.0, 2.0, math.nan], [6.0, 1e9, 3.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]]).bool()
    white = whitened(values, mask, keep_mean)
    kept = torch.tensor([1.0, 2.0, 6.0, 3.0])
    expected = (kept - 3.0) / math.sqrt(3.5) + (3.0 if keep_mean else 0.0)
    torch.testing.assert_close(white[mask], expected)
    assert (white[~mask] == 0).all()


def test_leaving_one_out_compares_with_the_mean_of_the_other_answers() -> None:
    returns = [3.0, 1.0, 2.0, 0.0, 0.0, 6.0]
    got = leave_one_out(torch.tensor(returns), 3).tolist()
    wanted = []
    for group in (returns[:3], returns[3:]):
        for number, own in enumerate(group):
            others = group[:number] + group[number + 1 :]
            wanted.append(own - sum(others) / len(others))
    assert got == pytest.approx(wanted)


def test_a_group_whose_answers_are_alike_teaches_nothing() -> None:
    got = group_relative(torch.tensor([1.0, 1.0, 0.0, 4.0]), 2)
    assert got[:2].tolist() == [0, 0]
    deviation = math.sqrt(8)
    torch.testing.assert_close(got[2:], torch.tensor([-2.0, 2.0]) / (deviation + 1e-4))
