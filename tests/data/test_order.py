"""The order of samples: a permutation, the same for the same key, with nothing to store."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.data.order import Permutation


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 2000), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_every_place_comes_exactly_once(size: int, seed: int, epoch: int) -> None:
    permutation = Permutation(size, (seed, epoch))
    assert sorted(permutation[i] for i in range(size)) == list(range(size))


def test_neighbours_are_spread_and_epochs_differ() -> None:
    size = 10_000
    first = np.array([Permutation(size, (1, 0))[i] for i in range(size)])
    second = np.array([Permutation(size, (1, 1))[i] for i in range(size)])
    assert abs(np.corrcoef(np.arange(size), first)[0, 1]) < 0.05
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_a_place_past_the_end_is_refused() -> None:
    with pytest.raises(IndexError):
        Permutation(5, (0,))[5]
