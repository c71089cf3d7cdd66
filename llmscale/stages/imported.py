"""What ``llmscale import`` makes of a Hugging Face folder: sharded weights for any layout."""

import shutil
from pathlib import Path

from megatron.core import dist_checkpointing
from safetensors import SafetensorError

from llmscale.artifacts import COMPLETE, checksum, damage, mark_complete, new_folder
from llmscale.errors import RecipeError
from llmscale.models.huggingface import fill
from llmscale.models.huggingface_config import read_architecture, read_vocabulary
from llmscale.models.stored_weights import HuggingFaceWeights
from llmscale.parallel.layout import Layout
from llmscale.parallel.world import joined_world, process_groups
from llmscale.training.megatron_engine import MegatronEngine
from llmscale.training.megatron_state import load_model, model_state
from llmscale.training.settings import Optimizer

WEIGHTS = "weights"


def is_import(folder: Path) -> bool:
    """Whether ``import_huggingface`` made the folder."""
    return (folder / WEIGHTS / COMPLETE).exists()


def import_huggingface(source: Path, target: Path) -> int:
    """Writes ``target`` with sharded weights beside the folder's configuration and tokenizer.

    Returns:
        The number of parameters.

    Raises:
        RecipeError: if the folder is not a model of a known family in safetensors.
    """
    architecture = read_architecture(source)
    vocabulary = read_vocabulary(source)
    try:
        weights = HuggingFaceWeights(source)
    except (FileNotFoundError, SafetensorError) as error:
        raise RecipeError(f"{error}; give a folder with safetensors") from None
    with new_folder(target) as folder:
        rendezvous = f"file://{folder}/.rendezvous"
        layout = Layout()
        with (
            joined_world(rank=0, ranks=1, rendezvous=rendezvous, device="cpu"),
            process_groups(layout, seed=0),
        ):
            engine = MegatronEngine(architecture, vocabulary, layout, Optimizer(learning_rate=1.0))
            try:
                fill(engine.chunks, architecture, vocabulary, weights)
            except (KeyError, ValueError, SafetensorError) as error:
                raise RecipeError(f"{source}: its tensors do not fit: {error}") from None
            path = folder / WEIGHTS
            path.mkdir()
            dist_checkpointing.save(model_state(engine), str(path))
        (folder / ".rendezvous").unlink(missing_ok=True)
        mark_complete(path, {file.name: checksum(file) for file in sorted(path.iterdir())})
        for file in source.iterdir():
            if file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja"):
                shutil.copy(file, folder / file.name)
    return architecture.parameters(vocabulary)


def load_imported(engine: MegatronEngine, folder: Path) -> None:
    """Sets the engine's weights from an import, at the engine's own layout; collective.

    Raises:
        RecipeError: if a checksum does not hold.
    """
    path = folder / WEIGHTS
    if (wrong := damage(path)) is not None:
        raise RecipeError(f"{path}: {wrong}; run llmscale import again")
    load_model(engine, path)
