"""Instruction data in its usual forms, all read as conversations."""

import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from llmscale.data.records import Malformed


class Turn(NamedTuple):
    """What one side says."""

    role: Literal["system", "user", "assistant"]
    content: str


Conversation = tuple[Turn, ...]
FormOfRecord = TypeVar("FormOfRecord", bound=BaseModel)


class Form(BaseModel):
    """A form of record; keys it does not name are left alone."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _Alpaca(Form):
    instruction: str
    input: str = ""
    output: str

    def turns(self) -> Conversation:
        asked = f"{self.instruction}\n\n{self.input}" if self.input.strip() else self.instruction
        return Turn("user", asked), Turn("assistant", self.output)


class Message(Form):
    """One turn as a record has it."""

    role: Literal["system", "user", "assistant"]
    content: str


def turns_of(messages: Iterable[Message]) -> Conversation:
    """Messages as turns."""
    return tuple(Turn(message.role, message.content) for message in messages)


class _Chat(Form):
    messages: list[Message]

    def turns(self) -> Conversation:
        return turns_of(self.messages)


class _PromptAndResponse(Form):
    prompt: str
    response: str

    def turns(self) -> Conversation:
        return Turn("user", self.prompt), Turn("assistant", self.response)


LONE_SURROGATE = re.compile("[\ud800-\udfff]")
FORMS: dict[str, type[_Alpaca | _Chat | _PromptAndResponse]] = {
    "messages": _Chat,
    "instruction": _Alpaca,
    "prompt": _PromptAndResponse,
}
"""The key by which each form is known."""


def conversation(record: dict[str, Any]) -> Conversation:
    """An Alpaca record, chat messages, or a prompt and its response, as turns.

    Raises:
        Malformed: if it is none of these, an answer is empty, or nobody asks or answers.
    """
    known = next((form for key, form in FORMS.items() if key in record), None)
    if known is None:
        raise Malformed("missing field", f"none of {', '.join(FORMS)}")
    turns = read_form(known, record).turns()
    require_answers(turns)
    return turns


def require_answers(turns: Conversation) -> None:
    """Sees to it that somebody asks and somebody answers.

    Raises:
        Malformed: if nobody does, or an answer is empty.
    """
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        raise Malformed("no assistant turn")
    if any(not turn.content.strip() for turn in answers):
        raise Malformed("empty answer")
    if turns[0].role == "assistant":
        raise Malformed("nobody asks", "the first turn is the assistant's")
    for turn in turns:
        require_whole_characters(turn.content)


def require_whole_characters(text: str) -> None:
    """Sees to it that a text can be encoded.

    Raises:
        Malformed: if it holds half a character.
    """
    if LONE_SURROGATE.search(text):
        raise Malformed("half a character", "a lone surrogate, which is no text")


def read_form(form: type[FormOfRecord], record: dict[str, Any]) -> FormOfRecord:
    """A record in a form.

    Raises:
        Malformed: names the first field that is missing or wrong.
    """
    try:
        return form.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise Malformed("missing field", where) from None
        raise Malformed("wrong field", f"{where}: {first['msg']}") from None
