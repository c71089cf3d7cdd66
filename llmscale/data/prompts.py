"""Prompts that a model is to answer, from records in their usual forms; and on disk."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmscale.artifacts import write_text
from llmscale.data.conversations import (
    Conversation,
    Form,
    Message,
    Turn,
    read_form,
    require_whole_characters,
    turns_of,
)
from llmscale.data.order import number_at
from llmscale.data.records import Malformed

TEXT_KEYS = ("text", "response")


@dataclass(frozen=True)
class Prompt:
    """What is to be answered.

    Attributes:
        text: as people wrote it.
        tokens: as the model is given it.
        opening: whether it is the beginning of a text that is to go on, not a question.
    """

    text: str
    tokens: tuple[int, ...]
    opening: bool = False


class _Messages(Form):
    messages: list[Message]


class _Instruction(Form):
    instruction: str
    input: str = ""


class _Prompt(Form):
    prompt: str | list[Message]


def asked(record: dict[str, Any]) -> Conversation:
    """What a record asks, as turns up to the last question; an answer behind it is left out.

    Raises:
        Malformed: if it is no prompt, chat or instruction, or asks nothing.
    """
    if "messages" in record:
        turns = turns_of(read_form(_Messages, record).messages)
    elif "instruction" in record:
        own = read_form(_Instruction, record)
        text = f"{own.instruction}\n\n{own.input}" if own.input.strip() else own.instruction
        turns = (Turn("user", text),)
    elif "prompt" in record:
        prompt = read_form(_Prompt, record).prompt
        turns = (Turn("user", prompt),) if isinstance(prompt, str) else turns_of(prompt)
    else:
        raise Malformed("missing field", "none of prompt, messages, instruction")
    while turns and turns[-1].role != "user":
        turns = turns[:-1]
    if not turns or not turns[-1].content.strip():
        raise Malformed("empty prompt")
    for turn in turns:
        require_whole_characters(turn.content)
    return turns


def first_words(record: dict[str, Any], words: int) -> str:
    """The first words of a record's text.

    Raises:
        Malformed: if there is no text, or it has no more words.
    """
    key = next((key for key in TEXT_KEYS if key in record), None)
    if key is None:
        raise Malformed("missing field", f"none of {', '.join(TEXT_KEYS)}")
    text = record[key]
    if not isinstance(text, str):
        raise Malformed("wrong field", f"{key}: no text")
    require_whole_characters(text)
    found = text.split()
    if len(found) <= words:
        raise Malformed("too short", f"{len(found)} words, and {words} are to be gone on with")
    return " ".join(found[:words])


def write_prompts(prompts: Iterable[Prompt], file: Path) -> None:
    """Writes a line of JSON a prompt."""
    write_text(file, "".join(f"{json.dumps(asdict(prompt))}\n" for prompt in prompts))


def read_prompts(file: Path) -> list[Prompt]:
    """What ``write_prompts`` wrote."""
    with file.open(encoding="utf-8") as lines:
        read = [json.loads(line) for line in lines]
    return [Prompt(one["text"], tuple(one["tokens"]), one["opening"]) for one in read]


@dataclass(frozen=True)
class PromptSamples:
    """The prompts of a data set, each once an epoch, in an order that the seed gives."""

    prompts: Sequence[Prompt]
    seed: int

    def number_at(self, consumed: int) -> int:
        """Which prompt comes after ``consumed`` others."""
        return number_at(consumed, len(self.prompts), self.seed)
