"""Texts that people have judged, in their usual forms."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from llmscale.data.conversations import (
    Conversation,
    Form,
    Message,
    Turn,
    read_form,
    require_answers,
    require_whole_characters,
    turns_of,
)
from llmscale.data.records import Malformed

FormName = Literal["pairs", "rankings", "scores", "labels"]
Said = str | list[Message]


@dataclass(frozen=True)
class Response:
    """What was judged: a conversation that ends in an answer, or a text without a prompt."""

    turns: Conversation = ()
    text: str = ""

    @property
    def prompt(self) -> str:
        """What came before the answer, as one text; equal for answers to one prompt."""
        return repr(self.turns[:-1]) if self.turns else ""

    @property
    def answer(self) -> str:
        """What was answered."""
        return self.turns[-1].content if self.turns else self.text

    def answered(self, answer: str) -> "Response":
        """The same prompt with another answer."""
        if not self.turns:
            return Response(text=answer)
        return Response(turns=(*self.turns[:-1], Turn("assistant", answer)))


@dataclass(frozen=True)
class Judgement:
    """Responses to one prompt, and what people said of them.

    Attributes:
        responses: the best first, where several are compared.
        margin: by how much the first is better than the second, in a reward's units.
        target: the score of a single one; of a label 1 or 0.
    """

    form: FormName
    responses: tuple[Response, ...]
    margin: float = 0.0
    target: float = math.nan


class _Judged(Form):
    prompt: Said | None = None

    def responses(self, said: Iterable[Said]) -> tuple[Response, ...]:
        return tuple(_response(self.prompt, one) for one in said)


class _Pair(_Judged):
    chosen: Said
    rejected: Said
    margin: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    def judgement(self) -> Judgement:
        return Judgement("pairs", self.responses([self.chosen, self.rejected]), self.margin)


class _Ranking(_Judged):
    ranked: list[Said] = Field(min_length=2, alias="responses")

    def judgement(self) -> Judgement:
        return Judgement("rankings", self.responses(self.ranked))


class _Score(_Judged):
    response: Said
    score: float = Field(allow_inf_nan=False)

    def judgement(self) -> Judgement:
        return Judgement("scores", self.responses([self.response]), target=self.score)


class _Label(_Judged):
    response: Said
    label: bool

    def judgement(self) -> Judgement:
        return Judgement("labels", self.responses([self.response]), target=float(self.label))


FORMS: dict[str, type[_Pair | _Ranking | _Score | _Label]] = {
    "chosen": _Pair,
    "responses": _Ranking,
    "score": _Score,
    "label": _Label,
}
"""The key by which each form is known."""


def judgement(record: dict[str, Any]) -> Judgement:
    """A pair (``chosen``, ``rejected``), a ranking (``responses``, the best first), a
    ``response`` with its ``score``, or with a ``label`` that says whether it is wanted.

    Each may have a ``prompt``; prompts and responses are texts or lists of messages.

    Raises:
        Malformed: if it is none of these, a response is empty, two are equal or answer
            different prompts.
    """
    known = next((form for key, form in FORMS.items() if key in record), None)
    if known is None:
        raise Malformed("missing field", f"none of {', '.join(FORMS)}")
    made = read_form(known, record).judgement()
    for one in made.responses:
        _require_text(one)
    if len({one.prompt for one in made.responses}) > 1:
        raise Malformed("different prompts", "what is compared answers different prompts")
    if len({one.answer for one in made.responses}) < len(made.responses):
        raise Malformed("equal responses", "two that are compared are the same")
    return made


def _response(prompt: Said | None, said: Said) -> Response:
    if not prompt and isinstance(said, str):
        return Response(text=said)
    asked = turns_of(prompt) if isinstance(prompt, list) else ()
    if prompt and isinstance(prompt, str):
        asked = (Turn("user", prompt),)
    answered = turns_of(said) if isinstance(said, list) else (Turn("assistant", said),)
    return Response(turns=(*asked, *answered))


def _require_text(response: Response) -> None:
    if response.turns:
        require_answers(response.turns)
        if response.turns[-1].role != "assistant":
            raise Malformed("no assistant turn", "the last turn is not the assistant's")
    elif not response.text.strip():
        raise Malformed("empty answer")
    else:
        require_whole_characters(response.text)


@dataclass
class Contradictions:
    """Finds judgements that say the opposite of an earlier one."""

    _said: dict[tuple[str, ...], tuple[str, float]] = field(default_factory=dict)

    def check(self, place: str, made: Judgement) -> None:
        """Remembers a judgement.

        Raises:
            Malformed: if an earlier one, which it names, has the opposite.
        """
        prompt = made.responses[0].prompt
        answers = [one.answer for one in made.responses]
        if made.form in ("scores", "labels"):
            self._check_single(place, (made.form, prompt, answers[0]), made.target)
            return
        for worse in range(1, len(answers)):
            for better in range(worse):
                opposite = self._said.get((prompt, answers[worse], answers[better]))
                if opposite is not None:
                    raise Malformed("opposite of an earlier pair", opposite[0])
        for worse in range(1, len(answers)):
            for better in range(worse):
                self._said.setdefault((prompt, answers[better], answers[worse]), (place, 0.0))

    def _check_single(self, place: str, key: tuple[str, ...], target: float) -> None:
        earlier, said = self._said.setdefault(key, (place, target))
        if said != target:
            raise Malformed("opposite of an earlier judgement", earlier)


def require_form(made: Judgement, wanted: Sequence[FormName]) -> None:
    """Sees to it that a judgement is of a form that can be learned from.

    Raises:
        Malformed: if it is not.
    """
    if made.form not in wanted:
        raise Malformed("another form", f"{made.form}, where {' or '.join(wanted)} are needed")
