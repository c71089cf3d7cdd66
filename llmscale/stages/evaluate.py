"""Measuring a model: perplexity, classification, written texts, tasks, and samples of its text."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmscale.artifacts import version_of, write_json, write_text
from llmscale.clusters.base import ClusterSettings
from llmscale.clusters.base import Task as RankTask
from llmscale.data.corpus import read_split
from llmscale.data.documents import read_documents
from llmscale.errors import RecipeError
from llmscale.evaluation.generation import answers_or_continuations
from llmscale.models.architecture import Architecture
from llmscale.settings import NOT_IDENTITY, Name, Problem, under
from llmscale.stages.base import (
    MODEL_FILES,
    MODEL_KINDS,
    Link,
    ModelStage,
    RecipeView,
    Workspace,
)
from llmscale.stages.measures import Classification, Perplexity, Samples, Tasks, WrittenTexts
from llmscale.stages.shared import met, sharing_problems, sharing_task

SHARED = ("perplexity", "classification", "generation")
"""What ranks do together, before the first one does the rest."""
MEASURES = (*SHARED, "tasks", "samples")


class Evaluate(ModelStage):
    """``kind: evaluate``.

    ``classification`` and ``generation`` have a name for each file; what was answered and
    written is in the stage's folder, as ``classification-NAME.jsonl`` and
    ``generation-NAME.jsonl``. So many ``ranks`` of one node share texts and prompts; tasks and
    samples are the first one's.
    """

    kind: Literal["evaluate"]
    perplexity: Perplexity | None = None
    classification: dict[Name, Classification] | None = None
    generation: dict[Name, WrittenTexts] | None = None
    tasks_: Tasks | None = Field(default=None, alias="tasks")
    samples: Samples | None = None
    ranks: Annotated[PositiveInt, NOT_IDENTITY] = 1

    links: ClassVar[Mapping[str, Link]] = {
        **ModelStage.links,
        "model": Link((*MODEL_KINDS, "quantize"), or_folder=True, folder_holds=MODEL_FILES),
    }

    def sources(self) -> list[Any]:
        files = [file for measure in self._measures() for file in measure.files()]
        return [[file, *version_of(Path(file))] for file in files]

    def tasks(self, cluster: ClusterSettings) -> tuple[RankTask, ...]:
        return (sharing_task(self.ranks, on_device=True),)

    def _measures(self) -> list[Any]:
        """Those that read files."""
        named = [*(self.classification or {}).values(), *(self.generation or {}).values()]
        return [one for one in (self.perplexity, *named, self.tasks_) if one is not None]

    def problems(self, view: RecipeView) -> Iterator[Problem]:
        if not self._measures() and self.samples is None:
            yield Problem((), f"measures nothing; add {', '.join(MEASURES[:-1])} or {MEASURES[-1]}")
        if self.perplexity is not None:
            has_corpus = "corpus" in self.linked(view.stages)
            yield from under("perplexity", self.perplexity.problems(has_corpus))
        for name, labelled in (self.classification or {}).items():
            yield from under("classification", under(name, labelled.problems()))
        for name, written in (self.generation or {}).items():
            yield from under("generation", under(name, written.problems()))
        if self.tasks_ is not None:
            yield from under("tasks", self.tasks_.problems())
        yield from sharing_problems(self.ranks, view.cluster)
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

    def run(self, task: str, workspace: Workspace) -> None:
        from llmscale.evaluation.models import load_model
        from llmscale.evaluation.packages import require

        require(self.classification, self.generation, self.tasks_)
        with met(workspace, workspace.device):
            model, tokenizer = load_model(workspace.inputs["model"], workspace.device)
            rank = _Rank(self, workspace, model, tokenizer)
            for measure in SHARED if workspace.rank else MEASURES:
                figures = getattr(rank, measure)()
                if figures and workspace.rank == 0:
                    workspace.folder.add_metrics(**figures)


class _Rank:
    """A loaded model and what is measured of it; each measure gives its figures."""

    def __init__(self, stage: Evaluate, workspace: Workspace, model: Any, tokenizer: Any) -> None:
        self.stage = stage
        self.workspace = workspace
        self.model = model
        self.tokenizer = tokenizer

    def perplexity(self) -> dict[str, Any]:
        from llmscale.evaluation.perplexity import (
            Likelihood,
            likelihood_intervals,
            likelihoods,
            unigram_entropy,
        )

        settings = self.stage.perplexity
        if settings is None:
            return {}
        texts = list(self._texts(settings))
        if not any(texts):
            raise RecipeError("there is no text to score; raise the corpus's validation_fraction")
        longest = self.model.config.max_position_embeddings
        length = min(settings.window or longest, longest)
        each = likelihoods(
            self.model,
            self.tokenizer,
            texts,
            length=length,
            stride=min(settings.stride or max(1, length // 2), length),
            on_text=lambda done: self._progress("texts")(done, len(texts)),
        )
        counts = Counter(
            token
            for text in texts
            for token in self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        )
        return {
            **sum(each, Likelihood()).metrics(),
            **likelihood_intervals(each, self.workspace.seed),
            "unigram_entropy": unigram_entropy(counts.values()),
        }

    def _texts(self, perplexity: Perplexity) -> Iterable[str]:
        if perplexity.split is not None:
            return read_split(self.workspace.inputs["corpus"], perplexity.split)
        return (document.text for document in read_documents(Path(str(perplexity.text))))

    def classification(self) -> dict[str, Any]:
        from llmscale.evaluation.classification import classify

        found = {}
        for name, form in (self.stage.classification or {}).items():
            found[name], told = classify(
                self.model,
                self.tokenizer,
                form,
                form.task(),
                self.workspace.seed,
                self._progress(f"texts of {name}"),
            )
            self._write(f"classification-{name}.jsonl", told)
        return {"classification": found} if found else {}

    def generation(self) -> dict[str, Any]:
        from llmscale.evaluation.references import written_against_references

        found = {}
        for name, settings in (self.stage.generation or {}).items():
            found[name], told = written_against_references(
                self.model,
                self.tokenizer,
                settings.records(),
                settings,
                self.workspace.seed,
                self._progress(f"prompts of {name}"),
            )
            self._write(f"generation-{name}.jsonl", told)
        return {"generation": found} if found else {}

    def tasks(self) -> dict[str, Any]:
        from llmscale.evaluation.harness import harness_figures

        wanted = self.stage.tasks_
        if wanted is None:
            return {}
        folder = Path(wanted.folder) if wanted.folder else None
        return {"tasks": harness_figures(self.model, self.tokenizer, wanted.names, folder)}

    def samples(self) -> dict[str, Any]:
        samples, workspace = self.stage.samples, self.workspace
        if samples is None:
            return {}
        texts = []
        for number, prompt in enumerate(samples.prompts):
            workspace.progress.update(number, len(samples.prompts), "samples")
            seed = workspace.seed + number
            said, _ = answers_or_continuations(self.model, self.tokenizer, prompt, samples, seed)
            texts.append({"prompt": prompt, "text": said[0]})
        write_json(workspace.folder.path / "samples.json", texts)
        workspace.progress.update(len(texts), len(texts), "samples")
        return {}

    def _progress(self, unit: str) -> Callable[[int, int], None]:
        if self.workspace.rank > 0:
            return lambda done, total: None
        return lambda done, total: self.workspace.progress.update(done, total, unit)

    def _write(self, name: str, told: list[dict[str, Any]]) -> None:
        if self.workspace.rank > 0:
            return
        lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in told)
        write_text(self.workspace.folder.path / name, "".join(lines))
