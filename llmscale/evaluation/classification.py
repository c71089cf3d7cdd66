"""Texts classified by a language model, as it is: which label it finds likeliest, or names."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmscale.evaluation.classification_form import ClassificationForm, Task
from llmscale.evaluation.figures import Answers, answer_figures, group_figures, kept_figures
from llmscale.evaluation.labelled import Labelled, with_examples
from llmscale.evaluation.perturbations import Perturbation, perturbed

OnRow = Callable[[int, int], None]


def classify(
    model: Any,
    tokenizer: Any,
    form: ClassificationForm,
    task: Task,
    seed: int,
    on_row: OnRow = lambda done, total: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures, and what was answered to each text.

    Raises:
        MachineError: if scikit-learn is missing.
        RecipeError: names a prompt that is longer than the model's positions.
    """
    asking = _Asking(model, tokenizer, form, task, seed, on_row)
    answers, told = asking.answers(task.texts)
    figures = answer_figures(answers, seed)
    if form.group:
        figures |= group_figures(answers, [one.group for one in task.texts], seed)
    if form.perturbations:
        figures["perturbations"] = {
            kind: kept_figures(answers, asking.answers(_spoilt(task.texts, kind, seed))[0], seed)
            for kind in form.perturbations
        }
    return figures, told


def _spoilt(texts: Sequence[Labelled], kind: Perturbation, seed: int) -> list[Labelled]:
    return [
        one.with_fields(
            {
                field: perturbed(text, kind, f"{seed} {number} {field}")
                for field, text in one.fields.items()
            }
        )
        for number, one in enumerate(texts)
    ]


@dataclass(frozen=True)
class _Asking:
    """A model that is asked in a form."""

    model: Any
    tokenizer: Any
    form: ClassificationForm
    task: Task
    seed: int
    on_row: OnRow

    def answers(self, texts: Sequence[Labelled]) -> tuple[Answers, list[dict[str, Any]]]:
        """What is answered to each text of the task, or to a spoilt one in its place."""
        form, task = self.form, self.task
        if task.examples:
            prompts = with_examples(
                texts, task.texts, task.examples, form.shots, form.template, task.labels, self.seed
            )
        else:
            prompts = [one.prompt(form.template) for one in texts]
        ask = self._likeliest if form.answer == "likelihood" else self._written
        given, confidence_n, details = ask(texts, prompts)
        right = [one.label for one in texts]
        told = [
            {"place": one.place, "label": one.label, "answer": answer, **detail}
            for one, answer, detail in zip(texts, given, details, strict=True)
        ]
        return Answers(list(task.labels), right, given, confidence_n), told

    def _likeliest(
        self, texts: Sequence[Labelled], prompts: Sequence[str]
    ) -> tuple[list[str], np.ndarray, list[dict[str, Any]]]:
        """Of equal scores the label named first; confidence is the scores' softmax."""
        from llmscale.evaluation.label_likelihood import label_likelihoods

        names = list(self.task.labels)
        found = label_likelihoods(
            self.model,
            self.tokenizer,
            prompts,
            list(self.task.labels.values()),
            [one.place for one in texts],
            on_row=self.on_row,
        )
        scores_nl = found.scores(self.form.normalization)
        weights_nl = np.exp(scores_nl - scores_nl.max(1, keepdims=True))
        confidence_n = weights_nl.max(1) / weights_nl.sum(1)
        given = [names[number] for number in scores_nl.argmax(1)]
        details = [{"scores": dict(zip(names, map(float, row), strict=True))} for row in scores_nl]
        return given, confidence_n, details

    def _written(
        self, texts: Sequence[Labelled], prompts: Sequence[str]
    ) -> tuple[list[str], np.ndarray | None, list[dict[str, Any]]]:
        from llmscale.evaluation.prompted import written_answers

        voted = self.form.answer == "self_consistency"
        found = written_answers(
            self.model,
            self.tokenizer,
            prompts,
            self.task.labels,
            self.form.generation(),
            thought=self.form.answer != "greedy",
            votes=self.form.votes if voted else 1,
            seed=self.seed,
            on_prompt=self.on_row,
        )
        confidence_n = np.array([one.confidence for one in found]) if voted else None
        details = [{"written": list(one.written)} for one in found]
        return [one.label for one in found], confidence_n, details
