"""Text from a model: greedy, beam search or sampling, by ``transformers``."""

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llmscale.data.conversations import Turn
from llmscale.data.records import Malformed
from llmscale.errors import RecipeError
from llmscale.settings import Settings

Decoding = Literal["greedy", "beam", "sample"]


class Generation(Settings):
    """How text is generated."""

    decoding: Decoding = "greedy"
    max_new_tokens: PositiveInt = 100
    beams: PositiveInt = 4
    temperature: PositiveFloat = 1.0
    top_k: PositiveInt | None = None
    top_p: float = Field(default=1.0, gt=0, le=1)


def continuations(
    model: Any,
    tokenizer: Any,
    prompt: str,
    settings: Generation,
    seed: int,
    stop: str = "",
    several: int = 1,
) -> list[str]:
    """The prompt's continuations, within the model's positions; the same for the same seed.

    Args:
        stop: what ends a text, beside the tokenizer's own token for that; it is left out.
        several: how many; more than one differ when they are sampled.
    """
    import torch

    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    ids = inputs["input_ids"]
    if ids.shape[1] == 0:
        ids = torch.tensor([[tokenizer.eos_token_id]])
    choices: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        "beam": {"do_sample": False, "num_beams": settings.beams},
        "sample": {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_k": settings.top_k or 0,
            "top_p": settings.top_p,
        },
    }
    room = model.config.max_position_embeddings - ids.shape[1]
    padding = tokenizer.pad_token_id
    output = model.generate(
        ids.to(model.device),
        attention_mask=torch.ones_like(ids).to(model.device),
        max_new_tokens=max(1, min(settings.max_new_tokens, room)),
        pad_token_id=tokenizer.eos_token_id if padding is None else padding,
        eos_token_id=tokenizer.eos_token_id,
        num_return_sequences=several,
        **choices[settings.decoding],
        **({"stop_strings": [stop], "tokenizer": tokenizer} if stop else {}),
    )
    texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.partition(stop)[0] if stop else text for text in texts]


def answers_or_continuations(
    model: Any,
    tokenizer: Any,
    prompt: str,
    settings: Generation,
    seed: int,
    raw: bool = False,
    several: int = 1,
) -> tuple[list[str], bool]:
    """What a model with a chat template answers, else its continuations; and whether it answers.

    Args:
        raw: leave the template out.
        several: how many.

    Raises:
        RecipeError: if the template refuses a prompt alone.
    """
    from llmscale.data.chat import end_of_answer, own_template, prompt_text

    template = None if raw else own_template(tokenizer)
    if template is None:
        return continuations(model, tokenizer, prompt, settings, seed, "", several), False
    try:
        asked = prompt_text((Turn("user", prompt),), tokenizer, template)
        stop = end_of_answer(tokenizer, template)
    except Malformed as problem:
        raise RecipeError(f"the model's chat template: {problem}; leave it out by --raw") from None
    return continuations(model, tokenizer, asked, settings, seed, stop, several), True
