"""BLEU and ROUGE of what a model writes against what people wrote."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmscale.evaluation.bootstrap import interval, mean_interval
from llmscale.evaluation.generation import Generation, answers_or_continuations
from llmscale.evaluation.packages import package
from llmscale.evaluation.referenced import Referenced
from llmscale.parallel import shares

ROUGE = ("rouge1", "rouge2", "rougeL")
NAMED = 5
"""How many places of empty continuations an answer names."""


def written_against_references(
    model: Any,
    tokenizer: Any,
    records: Sequence[Referenced],
    settings: Generation,
    seed: int,
    on_prompt: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures of a model's continuations, one prompt at a time, and the continuations.

    Ranks that have met share the prompts; collective then.

    Raises:
        MachineError: if sacrebleu or rouge-score is missing.
    """
    for name in ("sacrebleu", "rouge_score"):
        package(name, "generation")

    def written(numbers: list[int]) -> list[str]:
        texts = []
        for number in numbers:
            prompt = records[number].prompt
            said, _ = answers_or_continuations(model, tokenizer, prompt, settings, seed + number)
            texts.append(said[0])
            on_prompt(number + 1, len(records))
        return texts

    texts = shares.shared(list(range(len(records))), written)
    told = [
        {
            "place": one.place,
            "prompt": one.prompt,
            "written": text,
            "references": list(one.references),
        }
        for one, text in zip(records, texts, strict=True)
    ]
    return reference_figures(records, texts, seed), told


def reference_figures(
    records: Sequence[Referenced], texts: Sequence[str], seed: int
) -> dict[str, Any]:
    """BLEU, in [0, 100], and the means of ROUGE's F measures, in [0, 1], with 95 % intervals.

    Empty texts are no continuations: they are counted and named, and are in no other figure.
    Those are None where all texts are empty.
    """
    written = [(one, text) for one, text in zip(records, texts, strict=True) if text.strip()]
    empty = [one.place for one, text in zip(records, texts, strict=True) if not text.strip()]
    figures: dict[str, Any] = {"prompts": len(records), "written": len(written)}
    if empty:
        figures |= {"empty": len(empty), "empty_at": empty[:NAMED]}
    if not written:
        return figures | dict.fromkeys(("bleu", *(name.lower() for name in ROUGE)))
    references = [one.references for one, _ in written]
    given = [text for _, text in written]
    return figures | _bleu(given, references, seed) | _rouge(given, references, seed)


def _bleu(texts: Sequence[str], references: Sequence[Sequence[str]], seed: int) -> dict[str, Any]:
    """Corpus BLEU (Papineni et al. 2002; Post 2018), from the counts of each text."""
    sacrebleu = package("sacrebleu", "generation")
    metric = sacrebleu.metrics.BLEU(effective_order=True)
    told = [metric.sentence_score(*pair) for pair in zip(texts, map(list, references), strict=True)]
    counts_n = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in told])

    def bleu(drawn: np.ndarray) -> float:
        *counts, system, reference = counts_n[drawn].sum(0).tolist()
        orders = len(counts) // 2
        return float(
            metric.compute_bleu(
                counts[:orders], counts[orders:], system, reference, smooth_method="exp"
            ).score
        )

    everything = np.arange(len(texts))
    return {
        "bleu": bleu(everything),
        "bleu_interval": interval(bleu, [0] * len(texts), seed),
    }


def _rouge(texts: Sequence[str], references: Sequence[Sequence[str]], seed: int) -> dict[str, Any]:
    """Of several references the one that a text is nearest to (Lin 2004)."""
    scorer = package("rouge_score.rouge_scorer", "generation").RougeScorer(ROUGE)
    told = [scorer.score_multi(own, text) for own, text in zip(references, texts, strict=True)]
    figures: dict[str, Any] = {}
    for name in ROUGE:
        values_n = np.array([one[name].fmeasure for one in told])
        figures[name.lower()] = float(values_n.mean())
        figures[f"{name.lower()}_interval"] = mean_interval(values_n, seed)
    return figures
