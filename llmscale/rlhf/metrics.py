"""What is told of an iteration's answers.

Shape legend: n answers, s places a row.
"""

from collections.abc import Sequence
from statistics import fmean

from torch import Tensor

from llmscale.rlhf.answers import Answer
from llmscale.rlhf.scoring import Scores


def answer_figures(answers: Sequence[Answer], scores: Scores) -> dict[str, float]:
    """Rewards, in all and by source, lengths, and whether answers end and differ."""
    return {
        "reward": fmean(scores.total_n),
        **{f"reward_{name}": fmean(part) for name, part in scores.parts.items()},
        "answer_tokens": fmean(len(answer.tokens) for answer in answers),
        "without_end": fmean(not answer.ended for answer in answers),
        "distinct_2": distinct([answer.text for answer in answers], 2),
    }


def distinct(texts: Sequence[str], n: int) -> float:
    """The share of different ones among all sequences of n words (Li et al. 2016, section 5.2)."""
    words = [text.split() for text in texts]
    grams = [tuple(own[at : at + n]) for own in words for at in range(len(own) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def explained_variance(values_ns: Tensor, returns_ns: Tensor, mask_ns: Tensor) -> float:
    """How much of the returns' variance the values foretold: at most 1."""
    returns, errors = returns_ns[mask_ns], (returns_ns - values_ns)[mask_ns]
    spread = returns.var(correction=0)
    return float(1 - errors.var(correction=0) / spread) if spread > 0 else 0.0
