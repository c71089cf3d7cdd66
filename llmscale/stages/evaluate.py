"""Measuring a model: perplexity, bits per byte, and samples of its text."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmscale.artifacts import write_json
from llmscale.clusters.base import ClusterSettings, Task
from llmscale.data.corpus import read_split
from llmscale.data.documents import read_documents
from llmscale.errors import RecipeError
from llmscale.evaluation.generation import Decoding, Generation, answers_or_continuations
from llmscale.models.architecture import Architecture
from llmscale.settings import Problem, Settings
from llmscale.stages.base import (
    MODEL_FILES,
    Link,
    RecipePath,
    RecipeView,
    Stage,
    StageOrFolder,
    Workspace,
    is_file,
)


class Perplexity(Settings):
    """Which text is scored, and by windows of which length and stride, in tokens."""

    split: Literal["train", "validation"] | None = None
    text: RecipePath | None = None
    window: int | None = Field(default=None, ge=2)
    stride: PositiveInt | None = None


class Samples(Generation):
    """Texts the model goes on from."""

    prompts: tuple[str, ...] = Field(min_length=1)
    decoding: Decoding = "sample"


class Evaluate(Stage):
    """``kind: evaluate``."""

    kind: Literal["evaluate"]
    model: StageOrFolder
    corpus: str | None = None
    perplexity: Perplexity | None = None
    samples: Samples | None = None

    links: ClassVar[Mapping[str, Link]] = {
        "model": Link(
            ("pretrain", "finetune", "dpo", "quantize"), or_folder=True, folder_holds=MODEL_FILES
        ),
        "corpus": Link(("prepare",)),
    }

    def linked(self, stages: Mapping[str, Stage]) -> dict[str, str]:
        """Without a ``corpus`` of its own, its model's, unless that was trained on a ``blend``."""
        named = super().linked(stages)
        trained_on = getattr(stages.get(self.model), "corpus", None)
        if "corpus" not in named and trained_on in stages:
            named["corpus"] = str(trained_on)
        return named

    def tasks(self, cluster: ClusterSettings) -> tuple[Task, ...]:
        return (Task("run", on_device=True),)

    def problems(self, view: RecipeView) -> Iterator[Problem]:
        if self.perplexity is None and self.samples is None:
            yield Problem((), "measures nothing; add perplexity or samples")
        if self.perplexity is not None:
            yield from self._perplexity_problems(self.perplexity, view)
        yield from self._objective_problems(view)

    def _objective_problems(self, view: RecipeView) -> Iterator[Problem]:
        trained = view.stages.get(self.model)
        try:
            model: Architecture | None = trained.architecture() if trained else None  # type: ignore[attr-defined]
        except (AttributeError, RecipeError):
            return  # no training stage, or one that says itself what is wrong with its model
        if model is not None and model.traits.objective != "causal":
            yield Problem(
                ("model",),
                f"{self.model} trains {model.family}, which does not go on from a text, so it has "
                "neither perplexity nor samples; remove this stage",
            )

    def _perplexity_problems(self, perplexity: Perplexity, view: RecipeView) -> Iterator[Problem]:
        if (perplexity.split is None) == (perplexity.text is None):
            given = "neither is given" if perplexity.text is None else "both are given"
            yield Problem(("perplexity",), f"give either split or text, not both; {given}")
        elif perplexity.split is not None and "corpus" not in self.linked(view.stages):
            yield Problem(
                ("perplexity", "split"),
                "there is no corpus to take it from; set corpus, or give perplexity.text",
            )
        elif perplexity.text is not None and not is_file(perplexity.text):
            yield Problem(
                ("perplexity", "text"), f"{perplexity.text} is no file; give a text file's path"
            )
        if perplexity.window and perplexity.stride and perplexity.stride > perplexity.window:
            yield Problem(
                ("perplexity", "stride"),
                f"{perplexity.stride} is above window {perplexity.window}, which would leave "
                f"tokens out; use at most {perplexity.window}",
            )

    def run(self, task: str, workspace: Workspace) -> None:
        from llmscale.evaluation.models import load_model

        model, tokenizer = load_model(workspace.inputs["model"], workspace.device)
        if self.perplexity is not None:
            workspace.folder.add_metrics(
                **self._score(self.perplexity, model, tokenizer, workspace)
            )
        if self.samples is not None:
            self._sample(self.samples, model, tokenizer, workspace)

    def _texts(self, perplexity: Perplexity, workspace: Workspace) -> Iterable[str]:
        if perplexity.split is not None:
            return read_split(workspace.inputs["corpus"], perplexity.split)
        return (document.text for document in read_documents(Path(str(perplexity.text))))

    def _score(
        self, perplexity: Perplexity, model: Any, tokenizer: Any, workspace: Workspace
    ) -> dict[str, float]:
        from llmscale.evaluation.perplexity import likelihood, unigram_entropy

        texts = list(self._texts(perplexity, workspace))
        if not any(texts):
            raise RecipeError("there is no text to score; raise the corpus's validation_fraction")
        longest = model.config.max_position_embeddings
        length = min(perplexity.window or longest, longest)
        total = likelihood(
            model,
            tokenizer,
            texts,
            length=length,
            stride=min(perplexity.stride or max(1, length // 2), length),
            on_text=lambda done: workspace.progress.update(done, len(texts), "texts"),
        )
        counts = Counter(
            token
            for text in texts
            for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        )
        return {**total.metrics(), "unigram_entropy": unigram_entropy(counts.values())}

    def _sample(self, samples: Samples, model: Any, tokenizer: Any, workspace: Workspace) -> None:
        texts = []
        for number, prompt in enumerate(samples.prompts):
            workspace.progress.update(number, len(samples.prompts), "samples")
            seed = workspace.seed + number
            said, _ = answers_or_continuations(model, tokenizer, prompt, samples, seed)
            texts.append({"prompt": prompt, "text": said[0]})
        write_json(workspace.folder.path / "samples.json", texts)
        workspace.progress.update(len(texts), len(texts), "samples")
