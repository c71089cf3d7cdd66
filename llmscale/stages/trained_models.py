"""The model that a stage trains, whatever its kind."""

from collections.abc import Mapping
from pathlib import Path

from llmscale.artifacts import StageFolder
from llmscale.models.huggingface_config import read_architecture
from llmscale.stages import tuning
from llmscale.stages.engines import TrainedModel
from llmscale.stages.pretrain import Pretrain
from llmscale.stages.reward import Reward
from llmscale.stages.reward_training import reward_model
from llmscale.stages.tokens import first_folder, pretrained
from llmscale.stages.trained import TrainedStage
from llmscale.stages.tuned import TunedStage


def trained_model(
    stage: TrainedStage, folder: StageFolder, inputs: Mapping[str, Path]
) -> tuple[TrainedModel, Path | None]:
    """The model of a stage that was begun, and the folder of its first weights, if any."""
    if isinstance(stage, Pretrain):
        return pretrained(stage, folder, inputs["tokenizer"]), first_folder(stage, folder)
    assert isinstance(stage, TunedStage), "there is no third kind that trains"
    start_from = inputs["start_from"]
    if isinstance(stage, Reward):
        return reward_model(stage, folder, start_from), start_from
    architecture = read_architecture(start_from)
    return tuning.tuned_model(stage, folder, start_from, architecture), start_from
