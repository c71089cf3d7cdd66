"""Fine-tuning a model on instruction data: it learns what assistants say."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveInt

from llmscale.settings import Name, Problem, Settings
from llmscale.stages.base import RecipeView, Workspace
from llmscale.stages.tuned import ABOUT_EXAMPLES, DataFiles, TunedStage


class FewOfEach(Settings):
    """So many examples of each class alone; which ones, the seed decides.

    ``class_key`` is the key of a record that holds its class.
    """

    examples: PositiveInt
    class_key: str


class DataSet(DataFiles):
    """Files of records: Alpaca's, chat messages, or prompts with responses.

    ``weight`` is the set's part of the samples, beside the other sets'.
    """

    few: FewOfEach | None = None


class Finetune(TunedStage):
    """``kind: finetune``. Gives ``checkpoints/`` and, of the best one, ``hf/``.

    The tokens that assistants say are learned. ``packing`` puts several examples into a sample,
    which do not see each other.
    """

    kind: Literal["finetune"]
    data: dict[Name, DataSet] = Field(min_length=1)
    packing: bool = False

    def problems(self, view: RecipeView) -> Iterator[Problem]:
        yield from super().problems(view)
        if self.adapter is not None and self.adapter.virtual and self.packing:
            yield Problem(
                ("packing",),
                "virtual tokens stand before a sample, not before each example in it; remove it",
            )

    def run(self, task: str, workspace: Workspace) -> None:
        from llmscale.stages.examples import fine_tuning, make_examples
        from llmscale.stages.train_rank import train

        if task == "train":
            train(self, workspace, fine_tuning(self, workspace))
        elif not (workspace.folder.path / ABOUT_EXAMPLES).exists():
            make_examples(self, workspace)
