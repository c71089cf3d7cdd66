"""How texts are asked about, and the files that are read for it; numpy is not imported."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llmscale.errors import RecipeError
from llmscale.evaluation.generation import Generation
from llmscale.evaluation.labelled import Labelled, fields_of, read_labelled
from llmscale.evaluation.perturbations import Perturbation
from llmscale.settings import Problem, Settings

AnswerForm = Literal["likelihood", "greedy", "chain_of_thought", "self_consistency"]


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
