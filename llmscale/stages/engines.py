"""The engine a recipe asks for, its model built and its first weights set."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from llmscale.clusters.devices import require_engine, require_quantization
from llmscale.errors import RecipeError
from llmscale.models.architecture import Architecture
from llmscale.models.huggingface import fill
from llmscale.models.score_head import HEAD, new_head
from llmscale.models.stored_weights import HuggingFaceWeights
from llmscale.parallel.layout import Layout
from llmscale.parallel.probes import require_precision
from llmscale.stages.imported import is_import, load_imported
from llmscale.stages.trained import TrainedStage
from llmscale.training.engine import Engine
from llmscale.training.megatron_adapter import start_adapter
from llmscale.training.megatron_engine import MegatronEngine
from llmscale.training.rounded_weights import Rounding
from llmscale.training.settings import Adapter


@dataclass(frozen=True)
class TrainedModel:
    """A model that is trained, and what goes with it into its Hugging Face folder.

    Attributes:
        tokenizer: the folder that has the tokenizer.
        chat_template: in Jinja, if there is one beside the tokenizer's own.
        adapter: what alone of it is trained, if not all.
        rounding: what its linear layers' weights are rounded to while it learns, if they are.
        padding: what fills rows up, of a model that scores texts.
        beside: files that go into the folder, by their names there, once they are written.
    """

    architecture: Architecture
    vocabulary: int
    tokenizer: Path
    chat_template: str | None = None
    adapter: Adapter | None = None
    rounding: Rounding | None = None
    padding: int | None = None
    beside: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class FirstWeights:
    """Where a model's first weights come from.

    Attributes:
        folder: a Hugging Face folder or an import; None for weights from the seed.
        left_out: whether a checkpoint is loaded instead, and they need not be set, but for
            those beneath an adapter.
    """

    folder: Path | None
    seed: int
    left_out: bool = False


@contextmanager
def built_engine(
    stage: TrainedStage,
    model: TrainedModel,
    first: FirstWeights,
    layout: Layout,
    device: str,
    frozen: bool = False,
    temperature: float = 1.0,
) -> Iterator[Engine]:
    """The engine, at a layout whose process groups are there; collective.

    Args:
        frozen: whether the model is only asked, never trained.
        temperature: what logits are divided by before they become probabilities.

    Raises:
        MachineError: if the machine lacks the precision or a package.
        RecipeError: if the first weights cannot be used.
    """
    require_precision(stage.precision, device)
    if stage.engine == "megatron":
        engine = MegatronEngine(
            model.architecture,
            model.vocabulary,
            layout,
            stage.optimizer,
            precision=stage.precision,
            recompute=stage.recompute,
            device=device,
            frozen=frozen,
            adapter=model.adapter,
            temperature=temperature,
            rounding=model.rounding,
        )
        if not first.left_out or model.adapter is not None:
            set_first_weights(engine, first)
        yield engine
        return
    require_engine(stage.engine)
    if model.adapter is not None and model.adapter.quantized:
        require_quantization()
    from llmscale.training.adapters import quantization, with_adapter
    from llmscale.training.deepspeed_engine import DeepSpeedEngine
    from llmscale.training.deepspeed_model import loaded_model

    if first.folder is None or is_import(first.folder):
        raise RecipeError(f"{first.folder}: engine deepspeed starts from a Hugging Face folder")
    head = None
    if model.architecture.scored:
        head = _WithHead(HuggingFaceWeights(first.folder), model.architecture, first.seed)[HEAD]
    loaded = loaded_model(
        first.folder,
        model.architecture,
        head,
        stage.zero,
        stage.recompute,
        device,
        quantization(model.adapter, stage.precision, device),
    )
    if model.adapter is not None:
        loaded = with_adapter(loaded, model.adapter, first.seed)
    zero_engine = DeepSpeedEngine(
        loaded,
        model.architecture,
        stage.zero,
        stage.optimizer,
        precision=stage.precision,
        device=device,
        frozen=frozen,
        temperature=temperature,
        rounding=model.rounding,
    )
    try:
        yield zero_engine
    finally:
        zero_engine.close()


def set_first_weights(engine: MegatronEngine, first: FirstWeights) -> None:
    """Weights from a Hugging Face folder or an import, else from the seed."""
    folder = first.folder
    if folder is None:
        fill(engine.chunks, engine.architecture, engine.vocabulary, first.seed)
    elif not is_import(folder):
        weights = HuggingFaceWeights(folder)
        source = _WithHead(weights, engine.architecture, first.seed)
        fill(engine.chunks, engine.architecture, engine.vocabulary, source)
    elif engine.architecture.scored:
        raise RecipeError(f"{folder}: a reward model starts from a Hugging Face folder")
    else:
        load_imported(engine, folder)
    start_adapter(engine.chunks, first.seed)


@dataclass(frozen=True)
class _WithHead:
    """A folder's tensors, and a new head for a model that is to score texts and has none."""

    weights: HuggingFaceWeights
    architecture: Architecture
    seed: int

    def __getitem__(self, name: str) -> Tensor:
        if name == HEAD and name not in self.weights:
            return new_head(len(self.architecture.scored), self.architecture.hidden_size, self.seed)
        return self.weights[name]
