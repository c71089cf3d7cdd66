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


def generate(
    model: Any, tokenizer: Any, prompt: str, settings: Generation, seed: int, stop: str = ""
) -> str:
    """The prompt's continuation, within the model's positions; the same for the same seed.

    Args:
        stop: what ends the text, beside the tokenizer's own token for that; it is left out.
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
        **choices[settings.decoding],
        **({"stop_strings": [stop], "tokenizer": tokenizer} if stop else {}),
    )
    text = str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return text.partition(stop)[0] if stop else text


def answer_or_continuation(
    model: Any, tokenizer: Any, prompt: str, settings: Generation, seed: int, raw: bool = False
) -> tuple[str, bool]:
    """What a model with a chat template answers, else its continuation; and whether it answers.

    Args:
        raw: leave the template out.

    Raises:
        RecipeError: if the template refuses a prompt alone.
    """
    from llmscale.data.chat import end_of_answer, own_template, prompt_text

    template = None if raw else own_template(tokenizer)
    if template is None:
        return generate(model, tokenizer, prompt, settings, seed), False
    try:
        asked = prompt_text((Turn("user", prompt),), tokenizer, template)
        stop = end_of_answer(tokenizer, template)
    except Malformed as problem:
        raise RecipeError(f"the model's chat template: {problem}; leave it out by --raw") from None
    return generate(model, tokenizer, asked, settings, seed, stop), True
