"""Texts as careless people write them: the same for the same seed."""

import itertools
import random
import string
from collections.abc import Callable
from typing import Literal

Perturbation = Literal["typos", "case", "punctuation", "word_swaps"]
RATE = 0.1
"""The part of a text's words that are changed; one at least."""


def perturbed(text: str, kind: Perturbation, seed: int | str) -> str:
    """A text with one word in ten changed: mistyped, in another case, its punctuation left out or
    put in, or in the other order with the next word.

    White space, and with ``word_swaps`` every word, stays as it is.
    """
    generator = random.Random(f"{kind} {seed}")
    words = _with_spaces(text)
    places = [number for number, word in enumerate(words) if not word.isspace()]
    if kind == "word_swaps":
        return _swapped(words, places, generator)
    wanted = max(1, round(RATE * len(places)))
    fitting = [place for place in places if _FITS[kind](words[place])] or places
    for place in generator.sample(fitting, min(wanted, len(fitting))):
        words[place] = _CHANGES[kind](words[place], generator)
    return "".join(words)


def _with_spaces(text: str) -> list[str]:
    """Words and the white space between them, alternating."""
    pieces: list[str] = []
    for sign in text:
        if pieces and pieces[-1][-1].isspace() == sign.isspace():
            pieces[-1] += sign
        else:
            pieces.append(sign)
    return pieces


def _swapped(words: list[str], places: list[int], generator: random.Random) -> str:
    pairs = [
        (first, second)
        for first, second in itertools.pairwise(places)
        if words[first] != words[second]
    ]
    wanted = max(1, round(RATE * len(places)))
    for first, second in generator.sample(pairs, min(wanted, len(pairs))):
        words[first], words[second] = words[second], words[first]
    return "".join(words)


def _mistyped(word: str, generator: random.Random) -> str:
    """Two neighbours exchanged, a sign left out, typed twice, or another letter in its place."""
    at = generator.randrange(len(word))
    after = at + 1
    ways = [
        word[:at] + word[after : after + 1] + word[at] + word[after + 1 :],
        word[:at] + word[after:],
        word[:at] + word[at] + word[at:],
        word[:at] + generator.choice(string.ascii_lowercase) + word[after:],
    ]
    different = [way for way in ways if way not in ("", word)]
    return generator.choice(different)


def _other_case(word: str, generator: random.Random) -> str:
    different = [way for way in (word.upper(), word.lower(), word.swapcase()) if way != word]
    return generator.choice(different) if different else word


def _other_punctuation(word: str, generator: random.Random) -> str:
    bare = word.strip(string.punctuation)
    return bare if bare and bare != word else word + generator.choice(",.;!?")


_FITS: dict[str, Callable[[str], bool]] = {
    "typos": lambda word: len(word) > 3,
    "case": lambda word: word.swapcase() != word,
    "punctuation": lambda word: True,
}
_CHANGES: dict[str, Callable[[str, random.Random], str]] = {
    "typos": _mistyped,
    "case": _other_case,
    "punctuation": _other_punctuation,
}
