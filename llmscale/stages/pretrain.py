"""Pretraining a model on a tokenized corpus, at any layout."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import PositiveInt

from llmscale.artifacts import folder_fingerprint
from llmscale.clusters.base import ClusterSettings, Task
from llmscale.data.span_lengths import SHORTEST_INPUT, span_lengths
from llmscale.errors import RecipeError
from llmscale.models.architecture import Architecture
from llmscale.models.huggingface_config import read_architecture
from llmscale.settings import Problem, under
from llmscale.stages.base import (
    TOKENIZER_FILES,
    Link,
    Named,
    RecipePath,
    RecipeView,
    StageOrFolder,
    Workspace,
)
from llmscale.stages.tokenizer import Tokenizer
from llmscale.stages.trained import TrainedStage
from llmscale.training.curriculum import Phase, PlacedPhase, Weights, lay_out, step_problems

CORPUS = Link(("prepare",))
FIRST_WEIGHTS = "first_weights"
"""The folder in a stage's with the weights from the seed, where an engine needs one."""
ABOUT_TOKENS = "tokens/tokens.json"
"""The file in a stage's folder that says what its tokens are, and that they are whole."""


class Pretrain(TrainedStage):
    """``kind: pretrain``. Gives ``checkpoints/`` and, of the best one, ``hf/``.

    ``start_from`` is a Hugging Face folder, or what ``llmscale import`` made of one; the
    architecture then is the folder's, and ``model`` is left out. ``separate_documents``
    keeps documents packed into one sample from seeing each other. Samples come from
    ``corpus``, or from several by the weights of ``blend``; the phases of ``curriculum`` may
    have blends and lengths of their own.
    """

    kind: Literal["pretrain"]
    corpus: str | None = None
    blend: Weights | None = None
    curriculum: tuple[Phase, ...] = ()
    tokenizer: StageOrFolder
    model: Architecture | None = None
    start_from: RecipePath | None = None
    sequence_length: PositiveInt | None = None
    separate_documents: bool = False
    steps: PositiveInt

    about: ClassVar[str] = ABOUT_TOKENS
    links: ClassVar[Mapping[str, Link]] = {
        "corpus": CORPUS,
        "tokenizer": Link(("tokenizer",), or_folder=True, folder_holds=TOKENIZER_FILES),
    }

    def architecture(self) -> Architecture:
        """The model's architecture, from the recipe or the folder it starts from.

        Raises:
            RecipeError: if the folder's ``config.json`` cannot be used.
        """
        if self.model is not None:
            return self.model
        return read_architecture(Path(str(self.start_from)))

    @property
    def window(self) -> int:
        """Tokens of a training sample that the model reads."""
        return self.sequence_length or self.architecture().sequence_length

    def named(self) -> Iterator[Named]:
        """The corpora of blends, too."""
        yield from super().named()
        for path, blend in self._blends():
            yield from (Named((*path, name), name, CORPUS) for name in blend)

    def _blends(self) -> Iterator[tuple[tuple[str, ...], Weights]]:
        """Each blend and its place."""
        if self.blend is not None:
            yield ("blend",), self.blend
        for number, phase in enumerate(self.curriculum):
            if phase.blend is not None:
                yield ("curriculum", str(number), "blend"), phase.blend

    def corpora(self) -> dict[str, str]:
        """Each corpus that is read, and the key of its folder among the stage's inputs."""
        return {named.name: named.key for named in self.named() if named.link is CORPUS}

    def phases(self) -> tuple[PlacedPhase, ...]:
        """The phases of training, in order."""
        weights = self.blend or {str(self.corpus): 1.0}
        return lay_out(self.curriculum, self.batch, self.window, weights)

    def problems(self, view: RecipeView) -> Iterator[Problem]:
        yield from self._corpus_problems()
        try:
            architecture = self._checked_architecture()
        except RecipeError as error:
            key = "model" if self.start_from is None or self.model is not None else "start_from"
            yield Problem((key,), str(error))
            return
        yield from under("model", architecture.problems())
        yield from self._tokenizer_problems(architecture, view)
        yield from self.training_problems(architecture, view.cluster, self.sequence_length)
        yield from under("optimizer", self.optimizer.problems(self.steps))
        if (wrong := _wrong_length(architecture, self.window)) is not None:
            yield Problem(("sequence_length",), wrong)
        yield from under("curriculum", step_problems(self.curriculum, self.steps))
        yield from self._phase_length_problems(architecture)

    def _corpus_problems(self) -> Iterator[Problem]:
        own = [key for key in ("corpus", "blend") if getattr(self, key) is not None]
        without = [n for n, phase in enumerate(self.curriculum) if phase.blend is None]
        if len(own) == 2:
            yield Problem(("blend",), "give either corpus or blend, not both; both are given")
        elif own and self.curriculum and not without:
            yield Problem((own[0],), "every phase of the curriculum has a blend; remove it")
        elif not own and not self.curriculum:
            yield Problem(("corpus",), "is missing; add it, or blend")
        elif not own and without:
            yield Problem(
                ("curriculum", str(without[0]), "blend"),
                "is missing, and the stage has neither corpus nor blend; add one of them",
            )

    def _phase_length_problems(self, architecture: Architecture) -> Iterator[Problem]:
        for number, phase in enumerate(self.curriculum):
            length, path = phase.sequence_length, ("curriculum", str(number), "sequence_length")
            if length is None:
                continue
            if (wrong := _wrong_length(architecture, length)) is not None:
                yield Problem(path, wrong)
            else:
                misfits = architecture.length_problems(self.parallel, length)
                yield from (Problem(path, problem.message) for problem in misfits)

    def _tokenizer_problems(
        self, architecture: Architecture, view: RecipeView
    ) -> Iterator[Problem]:
        tokenizer, kind = view.stages.get(self.tokenizer), architecture.traits.objective
        if kind == "spans" and self.separate_documents:
            yield Problem(
                ("separate_documents",), f"{architecture.family} cannot keep them apart; remove it"
            )
        if not isinstance(tokenizer, Tokenizer):
            return
        if kind == "masked" and not tokenizer.mask_token:
            yield Problem(
                ("tokenizer",),
                f"{self.tokenizer} has no mask token, which {architecture.family} needs; "
                f"set stages.{self.tokenizer}.mask_token: true",
            )
        if kind == "spans" and tokenizer.sentinels < self.sentinels():
            yield Problem(
                ("tokenizer",),
                f"{self.tokenizer} has {tokenizer.sentinels} sentinels, but {architecture.family} "
                f"needs {self.sentinels()}; "
                f"set stages.{self.tokenizer}.sentinels: {self.sentinels()}",
            )

    def sentinels(self) -> int:
        """How many spans t5 has taken out of its longest samples."""
        lengths = [phase.sequence_length or self.window for phase in self.curriculum]
        return span_lengths(max([self.window, *lengths])).spans

    def _checked_architecture(self) -> Architecture:
        if (self.model is None) == (self.start_from is None):
            given = "neither is given" if self.model is None else "both are given"
            raise RecipeError(f"give either model or start_from, not both; {given}")
        return self.architecture()

    def sources(self) -> list[object]:
        return [self.start_from and folder_fingerprint(Path(self.start_from))]

    def tasks(self, cluster: ClusterSettings) -> tuple[Task, ...]:
        tokens, train = self._tokens_task(cluster), self.training_task(cluster)
        if self.engine == "deepspeed" and self.start_from is None:
            return (tokens, Task("weights"), train)
        return (tokens, train)

    @staticmethod
    def _tokens_task(cluster: ClusterSettings) -> Task:
        """On Ray all ranks encode; elsewhere one process, which uses its node's cores."""
        if cluster.on != "ray":
            return Task("tokens")
        return Task(
            "tokens", cluster.ranks, cluster.nodes, fewer=tuple(range(1, cluster.ranks))[::-1]
        )

    def run(self, task: str, workspace: Workspace) -> None:
        from llmscale.stages.tokens import make_tokens, pretraining, write_first_weights
        from llmscale.stages.train_rank import train

        if task == "train":
            train(self, workspace, pretraining(self, workspace))
        elif task == "weights":
            write_first_weights(self, workspace)
        elif not (workspace.folder.path / ABOUT_TOKENS).exists():
            make_tokens(self, workspace)


def _wrong_length(architecture: Architecture, length: int) -> str | None:
    if length > architecture.sequence_length:
        longest = architecture.sequence_length
        return f"{length} is above the model's {longest}; use at most {longest}"
    if architecture.traits.objective == "spans" and length < SHORTEST_INPUT:
        return f"{length} is too short to take spans out; use at least {SHORTEST_INPUT}"
    return None
