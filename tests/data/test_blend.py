"""A blend keeps its proportions at every prefix, and any place of it is found at once."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmscale.data.blend import LONGEST_PATTERN, Blend

WEIGHTS = st.dictionaries(
    st.sampled_from("abcdef"), st.integers(1, 60).map(lambda n: n / 10), min_size=1
)


@given(weights=WEIGHTS, samples=st.integers(1, 1500))
def test_every_prefix_is_within_one_sample_of_its_proportions(
    weights: dict[str, float], samples: int
) -> None:
    blend = Blend(weights)
    total = sum(weights.values())
    seen: Counter[str] = Counter()
    for sample in range(samples):
        source, before = blend.place(sample)
        assert before == seen[source]
        seen[source] += 1
        for name, weight in weights.items():
            assert abs(seen[name] - (sample + 1) * weight / total) < 1
    assert blend.counts(samples) == {name: seen[name] for name in weights}


@given(weights=WEIGHTS, first=st.integers(0, 10**12))
def test_a_place_far_on_costs_no_more_than_the_first(weights: dict[str, float], first: int) -> None:
    blend = Blend(weights)
    source, before = blend.place(first)
    assert before == blend.counts(first)[source]
    assert blend.counts(first + 1)[source] == before + 1


def test_weights_are_taken_as_written() -> None:
    blend = Blend({"web": 0.7, "books": 0.2, "code": 0.1})
    assert blend.counts(10) == {"web": 7, "books": 2, "code": 1}
    assert blend.counts(10**9) == {"web": 7 * 10**8, "books": 2 * 10**8, "code": 10**8}


def test_weights_of_too_many_digits_are_refused() -> None:
    with pytest.raises(ValueError, match=f"after more than {LONGEST_PATTERN} samples"):
        Blend({"web": 0.3333333, "books": 0.6666667})
