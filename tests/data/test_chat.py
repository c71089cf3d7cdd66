"""Chat templates: what is learned is what assistants say, and nothing else."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.data.chat import encoded_conversation, prompt_text
from llmscale.data.conversations import Conversation, Turn
from llmscale.data.records import Malformed
from llmscale.data.templates import TEMPLATES
from llmscale.data.tokenizer import train_tokenizer

MARKED_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content + '<|im_end|>\n' }}{% endgeneration %}
{%- else -%}{{ message.content + '<|im_end|>\n' }}{%- endif -%}
{%- endfor -%}
"""
"""ChatML with the marks by which transformers itself tells what assistants say."""

CONVERSATION = (
    Turn("system", "Be brief."),
    Turn("user", "What is up?"),
    Turn("assistant", "The sky."),
    Turn("user", "Ünd dann?"),
    Turn("assistant", " 雲 \n and more"),
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = train_tokenizer(iter(["What is up? The sky. Be brief."] * 50), "bpe", 300)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


CONTENT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda text: "<|" not in text
)


@settings(max_examples=60)
@given(contents=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
def test_the_learned_tokens_are_those_transformers_marks(
    contents: list[tuple[str, str]], tokenizer: Any
) -> None:
    turns: Conversation = tuple(
        turn
        for asked, answered in contents
        for turn in (Turn("user", asked), Turn("assistant", answered))
    )
    example = encoded_conversation(turns, tokenizer, TEMPLATES["chatml"])
    marked = tokenizer.apply_chat_template(
        [turn._asdict() for turn in turns],
        chat_template=MARKED_CHATML,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert example.tokens_n.tolist() == marked["input_ids"]
    assert example.learned_n.tolist() == [bool(mark) for mark in marked["assistant_masks"]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_begins_where_generation_does_and_ends_the_text(
    name: str, tokenizer: Any
) -> None:
    template = TEMPLATES[name]
    example = encoded_conversation(CONVERSATION, tokenizer, template)
    prompt = prompt_text(CONVERSATION[:-1], tokenizer, template)
    asked = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    assert example.learned_n[asked:].all()
    learned = tokenizer.decode(example.tokens_n[asked:])
    end = "<|im_end|>\n" if name == "chatml" else tokenizer.eos_token
    assert learned == CONVERSATION[-1].content + end
    assert not example.learned_n[0]


def test_words_of_a_prompt_that_look_like_an_answer_are_not_learned(tokenizer: Any) -> None:
    turns = (Turn("user", "The sky."), Turn("assistant", "The sky."))
    example = encoded_conversation(turns, tokenizer, TEMPLATES["plain"])
    half = len(tokenizer("The sky.", add_special_tokens=False)["input_ids"])
    assert example.learned_n.tolist() == [False] * half + [True] * (half + 1)
    assert np.array_equal(example.tokens_n[:half], example.tokens_n[half : 2 * half])


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer: Any) -> None:
    last_only = "{{ messages[-1].content }}"
    with pytest.raises(Malformed, match="a template that changes earlier turns"):
        encoded_conversation(CONVERSATION, tokenizer, last_only)


def test_a_template_s_own_refusal_is_told(tokenizer: Any) -> None:
    picky = "{{ raise_exception('system turns are not supported') }}"
    with pytest.raises(Malformed, match="system turns are not supported"):
        encoded_conversation(CONVERSATION, tokenizer, picky)
