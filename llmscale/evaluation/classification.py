"""Texts classified by a language model, as it is: which label it finds likeliest, or names."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from llmscale.errors import RecipeError
from llmscale.evaluation.figures import Answers, answer_figures, group_figures, kept_figures
from llmscale.evaluation.generation import Generation
from llmscale.evaluation.labelled import Labelled, fields_of, read_labelled, with_examples
from llmscale.evaluation.perturbations import Perturbation, perturbed
from llmscale.settings import Problem, Settings

AnswerForm = Literal["likelihood", "greedy", "chain_of_thought", "self_consistency"]
OnRow = Callable[[int, int], None]


class ClassificationForm(Settings):
    """How texts are asked about, and what is measured of the answers.

    Attributes:
        template: the prompt, with a record's fields in braces.
        labels: what stands for each label behind the prompt; by default the label itself, after
            a space, of the labels there are.
        answer: the likeliest label, or the one that a generated answer names.
        normalization: what a label's log-probability is divided by.
        shots: how many labelled examples precede each prompt.
        votes: answers to each prompt of which the majority counts (self_consistency).
        perturbations: ways of spoiling the texts, to see how much accuracy is kept.
        group: the field that says who a record is about.
    """

    template: str = "{text}"
    labels: dict[str, str] = Field(default_factory=dict)
    answer: AnswerForm = "likelihood"
    normalization: Literal["none", "tokens", "bytes"] = "none"
    shots: PositiveInt = 4
    votes: PositiveInt = 5
    max_new_tokens: PositiveInt = 100
    temperature: PositiveFloat = 0.7
    perturbations: tuple[Perturbation, ...] = ()
    group: str | None = None

    def form_problems(self) -> Iterator[Problem]:
        """What is wrong beyond types."""
        if not fields_of(self.template):
            yield Problem(("template",), "takes no field of a record; write one, as {text}")
        if len(self.labels) == 1:
            yield Problem(("labels",), "one label leaves nothing to choose; give two or more")
        for label, text in self.labels.items():
            if not text.strip():
                yield Problem(("labels", label), "stands for no text; give one")

    def generation(self) -> Generation:
        """How answers are generated."""
        sampled = self.answer == "self_consistency"
        return Generation(
            decoding="sample" if sampled else "greedy",
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
        )


@dataclass(frozen=True)
class Task:
    """Labelled texts, what stands for their labels, and examples of them."""

    texts: Sequence[Labelled]
    labels: Mapping[str, str]
    examples: Sequence[Labelled]


def read_task(form: ClassificationForm, file: Path, examples: Path | None) -> Task:
    """What a form needs of its files.

    Raises:
        RecipeError: names the file and line that cannot be used.
    """
    fields = fields_of(form.template)
    texts = read_labelled(file, fields, form.labels, form.group)
    labels = form.labels or {name: f" {name}" for name in sorted({one.label for one in texts})}
    if len(labels) < 2:
        raise RecipeError(f"{file}: all records have one label; give labels, or other records")
    if form.group and len({one.group for one in texts}) < 2:
        raise RecipeError(f"{file}: all records are of one {form.group}; leave group out")
    known = read_labelled(examples, fields, labels) if examples else []
    if examples and len(known) < form.shots:
        raise RecipeError(
            f"{examples}: {len(known)} examples, of which {form.shots} are to be shown; add some, "
            "or lower shots"
        )
    return Task(texts, labels, known)


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
        """What is answered to each text, for counting and for reading."""
        form, task = self.form, self.task
        if task.examples:
            prompts = with_examples(
                texts, task.examples, form.shots, form.template, task.labels, self.seed
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
