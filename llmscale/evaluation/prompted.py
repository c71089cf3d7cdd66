"""Labels out of answers that a model writes: at once, after a chain of thought, or by a vote.

Chain of thought without examples is Kojima et al. 2022; the majority of several sampled chains,
self-consistency, is Wang et al. 2022.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from llmscale.evaluation.generation import Generation, answers_or_continuations
from llmscale.parallel import shares

THOUGHT = "Let's think step by step."


class Given(NamedTuple):
    """The label an answer names, or none; how sure it is, if it says; and what was written."""

    label: str
    confidence: float | None
    written: tuple[str, ...]


def named_label(text: str, labels: Mapping[str, str], last: bool) -> str:
    """The label whose name or text stands in an answer first, or last; empty if none does.

    Whole words, in any case. Of labels at one place the longest is meant.
    """
    found = [
        (match.start(), len(word), label)
        for label, own in labels.items()
        for word in {label, own.strip()}
        for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)
    ]
    if not found:
        return ""
    place = max(found)[0] if last else min(found)[0]
    return max(one for one in found if one[0] == place)[2]


def written_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    labels: Mapping[str, str],
    settings: Generation,
    *,
    thought: bool,
    votes: int,
    seed: int,
    on_prompt: Callable[[int, int], None] = lambda done, total: None,
) -> list[Given]:
    """The label that a model's answer to each prompt names; a prompt alone at a time.

    Ranks that have met share the prompts; collective then.

    Args:
        labels: each label's text.
        settings: how answers are generated.
        thought: whether it is told to think first: then the last label counts, else the first.
        votes: how many answers are generated; the label most of them name is given, of several
            the one named first.
        seed: of sampling; the same answers for the same seed, whatever else is asked.
    """

    def answered(numbers: list[int]) -> list[Given]:
        given = []
        for number in numbers:
            asked = f"{prompts[number]}\n{THOUGHT}" if thought else prompts[number]
            texts, _ = answers_or_continuations(
                model, tokenizer, asked, settings, seed + number, several=votes
            )
            named = Counter(named_label(text, labels, last=thought) for text in texts)
            del named[""]
            label, count = named.most_common(1)[0] if named else ("", 0)
            given.append(Given(label, count / votes if votes > 1 else None, tuple(texts)))
            on_prompt(number + 1, len(prompts))
        return given

    return shares.shared(list(range(len(prompts))), answered)
