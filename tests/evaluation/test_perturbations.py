"""Spoilt texts: each kind changes what it says and nothing else, and again the same."""

import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmscale.evaluation.perturbations import perturbed

TEXT = "The gorgeously elaborate film, it seems, is too long. A great one!\n  But why so\tlong?"
KINDS = ("typos", "case", "punctuation", "word_swaps")
TEXTS = st.text(alphabet="abcDEF ,.!é\n", min_size=1, max_size=80).filter(str.strip)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_spoilt_anew_by_another_seed_alone(kind: str) -> None:
    spoilt = {perturbed(TEXT, kind, seed) for seed in range(10)}
    assert TEXT not in spoilt
    assert len(spoilt) > 3
    assert perturbed(TEXT, kind, 3) == perturbed(TEXT, kind, 3)


@given(text=TEXTS, seed=st.integers(0, 99))
def test_case_changes_case_alone(text: str, seed: int) -> None:
    assert perturbed(text, "case", seed).casefold() == text.casefold()


@given(text=TEXTS, seed=st.integers(0, 99))
def test_punctuation_changes_punctuation_alone(text: str, seed: int) -> None:
    def bare(text: str) -> str:
        return "".join(sign for sign in text if sign not in string.punctuation)

    assert bare(perturbed(text, "punctuation", seed)) == bare(text)


@given(text=TEXTS, seed=st.integers(0, 99))
def test_word_swaps_keep_the_words(text: str, seed: int) -> None:
    assert Counter(perturbed(text, "word_swaps", seed).split()) == Counter(text.split())


@given(text=TEXTS, seed=st.integers(0, 99))
def test_typos_change_one_word_in_ten_by_one_sign(text: str, seed: int) -> None:
    before, after = text.split(), perturbed(text, "typos", seed).split()
    assert len(before) == len(after)
    changed = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    assert 1 <= len(changed) <= max(1, round(len(before) / 10))
    assert all(abs(len(old) - len(new)) <= 1 for old, new in changed)
