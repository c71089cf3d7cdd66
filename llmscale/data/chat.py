"""Conversations as tokens: by a chat template, and which tokens are answers.

Shape legend: n tokens of an example.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmscale.data.conversations import Conversation, Turn
from llmscale.data.records import Malformed


@dataclass(frozen=True)
class Example:
    """Tokens, and which of them a model is to learn to say.

    Attributes:
        tokens_n: int32.
        learned_n: bool; never the first token, which nothing comes before.
    """

    tokens_n: np.ndarray
    learned_n: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens_n)


def encoded_conversation(
    conversation: Conversation, tokenizer: Any, template: str, last_alone: bool = False
) -> Example:
    """A conversation as the template writes it; what assistants say in it is learned.

    An answer reaches from where generation would start to what the template puts behind it.
    A token that begins before an answer is none of it.

    Args:
        tokenizer: a fast one of transformers, for its offsets.
        template: in Jinja.
        last_alone: whether only the last answer is learned.

    Raises:
        Malformed: if the template changes earlier turns when later ones come, or refuses them.
    """
    text, answers = _rendered(conversation, tokenizer, template)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts_n = np.array([start for start, _ in coded["offset_mapping"]], dtype=np.int64)
    learned_n = np.zeros(len(starts_n), dtype=bool)
    for first, end in answers[-1:] if last_alone else answers:
        learned_n |= (starts_n >= first) & (starts_n < end)
    learned_n[:1] = False
    return Example(np.array(coded["input_ids"], dtype=np.int32), learned_n)


def encoded_text(text: str, tokenizer: Any) -> Example:
    """A text without a prompt, to its end; all of it but the first token is learned."""
    tokens = [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    tokens_n = np.array([*tokens, tokenizer.eos_token_id], dtype=np.int32)
    return Example(tokens_n, np.arange(len(tokens_n)) > 0)


def prompt_text(conversation: Conversation, tokenizer: Any, template: str) -> str:
    """What a model is given, to answer the conversation's last turn."""
    return _render(conversation, tokenizer, template, ask=True)


def own_template(tokenizer: Any) -> str | None:
    """The chat template that goes with a tokenizer, if any; of several, the default one."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def end_of_answer(tokenizer: Any, template: str) -> str:
    """What a template writes behind an answer, without the white space around it."""
    answered = (Turn("user", "?"), Turn("assistant", "answer"))
    return _render(answered, tokenizer, template).rpartition("answer")[2].strip()


def _rendered(
    conversation: Conversation, tokenizer: Any, template: str
) -> tuple[str, list[tuple[int, int]]]:
    """The whole text, and where in it each answer begins and ends."""
    text = _render(conversation, tokenizer, template)
    spans = []
    for before, after in _texts_around_answers(conversation, tokenizer, template):
        if not (text.startswith(after) and after.startswith(before)):
            raise Malformed(
                "a template that changes earlier turns",
                "its answers cannot be told apart; use another template",
            )
        spans.append((len(before), len(after)))
    return text, spans


def _texts_around_answers(
    conversation: Conversation, tokenizer: Any, template: str
) -> Iterator[tuple[str, str]]:
    for number, turn in enumerate(conversation):
        if turn.role == "assistant":
            yield (
                _render(conversation[:number], tokenizer, template, ask=True),
                _render(conversation[: number + 1], tokenizer, template),
            )


def _render(conversation: Conversation, tokenizer: Any, template: str, ask: bool = False) -> str:
    import jinja2

    messages = [{"role": turn.role, "content": turn.content} for turn in conversation]
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=ask
            )
        )
    except jinja2.TemplateError as error:
        raise Malformed("refused by the chat template", str(error)) from None
