"""A tokenizer trained on a corpus."""

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field

from llmscale.artifacts import new_folder
from llmscale.data.corpus import read_split
from llmscale.settings import Problem
from llmscale.stages.base import Link, RecipeView, Stage, Workspace

BYTE_ALPHABET = 256


class Tokenizer(Stage):
    """``kind: tokenizer``.

    ``mask_token`` adds the token that models of family bert need, and ``sentinels`` as many
    tokens for spans taken out of texts, for t5.
    """

    kind: Literal["tokenizer"]
    corpus: str
    algorithm: Literal["bpe", "wordpiece", "unigram"] = "bpe"
    vocabulary_size: int = Field(ge=64, le=2**20)
    mask_token: bool = False
    sentinels: int = Field(default=0, ge=0, le=2**16)

    product: ClassVar[str] = "tokenizer"
    links: ClassVar[Mapping[str, Link]] = {"corpus": Link(("prepare",))}

    def problems(self, view: RecipeView) -> Iterator[Problem]:
        special = 2 + self.mask_token + self.sentinels
        smallest = special + (0 if self.algorithm == "wordpiece" else BYTE_ALPHABET)
        if self.vocabulary_size < smallest:
            yield Problem(
                ("vocabulary_size",),
                f"{self.vocabulary_size} is below the {smallest - special} bytes and {special} "
                f"special tokens; use at least {smallest}",
            )

    def run(self, task: str, workspace: Workspace) -> None:
        from llmscale.data.tokenizer import train_tokenizer

        corpus = workspace.inputs["corpus"]
        workspace.progress.update(0, 1, "tokenizer", "learning merges")
        tokenizer = train_tokenizer(
            read_split(corpus, "train"),
            self.algorithm,
            self.vocabulary_size,
            mask_token=self.mask_token,
            sentinels=self.sentinels,
        )
        with new_folder(workspace.folder.path / "tokenizer") as folder:
            tokenizer.save_pretrained(folder)
        tokens = characters = 0
        for text in read_split(corpus, "validation"):
            tokens += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            characters += len(text)
        workspace.progress.update(1, 1, "tokenizer")
        workspace.folder.add_metrics(
            vocabulary=len(tokenizer),
            characters_per_token=round(characters / tokens, 4) if tokens else None,
        )
