"""Fine-tuning a model on instruction data: it learns what assistants say."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveInt

from llmscale.clusters.base import ClusterSettings
from llmscale.errors import RecipeError
from llmscale.models.architecture import Architecture
from llmscale.quantization.schemes import SCHEMES, QuantizationAware, fitting_group_size
from llmscale.settings import Name, Problem, Settings, under
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


def group_size(wanted: QuantizationAware, architecture: Architecture) -> int | None:
    """Weights that have a scale in common; None where they are whole rows.

    Raises:
        RecipeError: if none, or not the one wanted, divides every layer's inputs.
    """
    if not SCHEMES[wanted.scheme].grouped:
        return None
    attention = architecture.attention_heads * architecture.head
    widths = (architecture.hidden_size, attention, architecture.ffn)
    return fitting_group_size(wanted.group_size, widths)[0]


class Finetune(TunedStage):
    """``kind: finetune``. Gives ``checkpoints/`` and, of the best one, ``hf/``.

    The tokens that assistants say are learned. ``packing`` puts several examples into a sample,
    which do not see each other. With ``quantization_aware`` it learns with the weights that
    quantizing leaves.
    """

    kind: Literal["finetune"]
    data: dict[Name, DataSet] = Field(min_length=1)
    packing: bool = False
    quantization_aware: QuantizationAware | None = None

    def problems(self, view: RecipeView) -> Iterator[Problem]:
        yield from super().problems(view)
        if self.adapter is not None and self.adapter.virtual and self.packing:
            yield Problem(
                ("packing",),
                "virtual tokens stand before a sample, not before each example in it; remove it",
            )

    def training_problems(
        self, architecture: Architecture, cluster: ClusterSettings, sequence_length: int | None
    ) -> Iterator[Problem]:
        yield from super().training_problems(architecture, cluster, sequence_length)
        if self.quantization_aware is not None:
            misfits = self._rounding_problems(self.quantization_aware, architecture)
            yield from under("quantization_aware", misfits)

    def _rounding_problems(
        self, wanted: QuantizationAware, architecture: Architecture
    ) -> Iterator[Problem]:
        if not SCHEMES[wanted.scheme].grouped:
            for key in wanted.model_fields_set & {"group_size", "symmetric"}:
                yield Problem((key,), "is of groups; remove it, or use scheme int4-weight")
        try:
            group_size(wanted, architecture)
        except RecipeError as error:
            yield Problem(("group_size",), str(error).removeprefix("group_size: "))
        if architecture.family == "gpt2":
            yield Problem((), "gpt2 has no int8-weight or int4-weight; remove it")
        if self.adapter is not None:
            yield Problem((), "an adapter's model is not rounded; remove one of the two")
        if self.engine == "deepspeed" and self.zero.stage == 3:
            yield Problem(
                (), "rounding needs whole rows; use zero.stage 0 to 2, or engine megatron"
            )

    def run(self, task: str, workspace: Workspace) -> None:
        from llmscale.stages.examples import fine_tuning, make_examples
        from llmscale.stages.train_rank import train

        if task == "train":
            train(self, workspace, fine_tuning(self, workspace))
        elif not (workspace.folder.path / ABOUT_EXAMPLES).exists():
            make_examples(self, workspace)
