"""The kinds of stages. A new kind is a module here, named like it, and its name below."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmscale.stages.base import Stage

KINDS = (
    "prepare",
    "tokenizer",
    "pretrain",
    "finetune",
    "reward",
    "dpo",
    "ppo",
    "quantize",
    "compare",
    "evaluate",
)


def settings_of(kind: str) -> "type[Stage]":
    """The settings of a kind of stage, read when a recipe has one: all take a while."""
    found: type[Stage] = getattr(import_module(f"{__name__}.{kind}"), kind.capitalize())
    return found
