"""What the ranks of a proof do: the reference at one rank, the layout, and what it left.

Each runs within the process groups of its own layout.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file

from llmscale.artifacts import read_json, write_json
from llmscale.data.samples import Samples, rank_places
from llmscale.models.huggingface import export, fill
from llmscale.training.batches import ModelBatch
from llmscale.training.checkpoint import Checkpoints, TrainingState
from llmscale.training.engine import Totals
from llmscale.training.megatron_engine import MegatronEngine
from llmscale.training.objectives import Objective, make_objective
from llmscale.verify.differences import (
    Difference,
    complete_gradients,
    differences,
    gradient_value,
    parameter_value,
    whole_values,
)
from llmscale.verify.proof import Proof

DOCUMENT_END, MASK, PADDING, FIRST_ORDINARY = 0, 1, 2, 3
SENTINELS = 16
MEAN_DOCUMENT = 12
"""Tokens; so that a sample holds several documents, and ends within one."""
CURVES, TENSORS = "curves.json", "tensors.json"


@dataclass(frozen=True)
class RandomTokens:
    """A corpus of random tokens, the same on every rank."""

    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def window(self, start: int, length: int) -> np.ndarray:
        """``length`` tokens from ``start`` on."""
        return self.tokens[start : start + length]


def _objective(proof: Proof) -> Objective:
    tokens = {
        "end_of_text": DOCUMENT_END,
        "mask_token": MASK,
        "padding": PADDING,
        "special_tokens": [DOCUMENT_END, MASK, PADDING],
        "sentinels": list(range(proof.vocabulary - SENTINELS, proof.vocabulary)),
        "tokenizer_size": proof.vocabulary,
    }
    return make_objective(
        proof.model.traits.objective,
        tokens,
        sequence_length=proof.model.sequence_length,
        seed=proof.seed,
        separate_documents=proof.separate_documents,
    )


def _samples(proof: Proof) -> Samples:
    length = _objective(proof).sample_length(proof.model.sequence_length)
    size = proof.batch.global_ * (proof.steps + 1) * length + 1
    random = np.random.default_rng(proof.seed)
    tokens = random.integers(FIRST_ORDINARY, proof.vocabulary - SENTINELS, size)
    tokens[random.random(size) < 1 / MEAN_DOCUMENT] = DOCUMENT_END
    return Samples(RandomTokens(tokens), length, proof.seed)


def _batches(proof: Proof, samples: Samples, step: int) -> list[ModelBatch]:
    objective = _objective(proof)
    places = rank_places(
        consumed=step * proof.batch.global_,
        global_batch=proof.batch.global_,
        micro_batch=proof.batch.micro,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_ranks=parallel_state.get_data_parallel_world_size(),
    )
    device = torch.device("cpu")
    return [
        objective.batch(
            np.stack([samples.window(samples.number_at(place)) for place in own]), own, device
        )
        for own in places
    ]


def _engine(proof: Proof) -> MegatronEngine:
    return MegatronEngine(
        proof.model,
        proof.vocabulary,
        proof.parallel,
        proof.optimizer,
        precision=proof.precision,
        recompute=proof.recompute,
    )


def _curve(totals: Totals, norm: float) -> dict[str, float]:
    return {"loss": totals.mean, "tokens": totals.count, "gradient_norm": norm}


def _tensors(folder: Path, step: int, what: str) -> Path:
    return folder / f"{what}-{step}.safetensors"


def run_reference(proof: Proof, folder: Path) -> None:
    """Trains at one rank; leaves curves, and after each step gradients and parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    samples, curves, plain = _samples(proof), [], proof.at_one_rank()
    engine = _engine(plain)
    fill(engine.chunks, proof.model, proof.vocabulary, proof.seed)
    for step in range(proof.steps + 1):
        if step == proof.steps:
            write_folder(engine, folder / "hf")
        totals = engine.backward(_batches(plain, samples, step))
        gradients = whole_values(engine, gradient_value)
        result = engine.update(totals, proof.optimizer.learning_rate)
        save_file(gradients, _tensors(folder, step + 1, "gradient"))
        parameters = whole_values(engine, parameter_value)
        save_file(parameters, _tensors(folder, step + 1, "parameter"))
        curves.append(_curve(totals, result.gradient_norm))
    write_json(folder / CURVES, curves)
    write_json(folder / TENSORS, sorted(parameters))


def run_layout(proof: Proof, reference: Path, folder: Path) -> None:
    """Trains at the layout and compares; leaves curves, differences, a checkpoint, an export."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    samples, curves = _samples(proof), []
    found: list[Difference] = []
    engine = _engine(proof)
    fill(engine.chunks, proof.model, proof.vocabulary, proof.seed)
    for step in range(proof.steps):
        totals = engine.backward(_batches(proof, samples, step))
        complete_gradients(engine)
        found += _compared(engine, reference, step + 1, "gradient")
        result = engine.update(totals, proof.optimizer.learning_rate)
        found += _compared(engine, reference, step + 1, "parameter")
        curves.append(_curve(totals, result.gradient_norm))
    consumed = proof.steps * proof.batch.global_
    state = TrainingState(step=proof.steps, consumed_samples=consumed)
    Checkpoints(folder / "checkpoints", keep=1).save(engine, state)
    write_folder(engine, folder / "hf")
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [asdict(difference) for difference in found])
    if dist.get_rank() == 0:
        export_found = exports_apart(reference / "hf", folder / "hf", proof.steps)
        answer = {
            "curves": curves,
            "differences": [difference for part in everyone for difference in part],
            "export": [asdict(difference) for difference in export_found],
        }
        write_json(folder / "layout.json", answer)
    dist.barrier()


def resume_at_one_rank(proof: Proof, reference: Path, folder: Path) -> None:
    """Loads the layout's checkpoint at one rank, compares, and takes one step more."""
    alone = proof.at_one_rank().model_copy(update={"optimizer": proof.optimizer})
    engine = _engine(alone)
    state = Checkpoints(folder / "checkpoints", keep=1).load(engine, proof.steps)
    found = _compared(engine, reference, state.step, "parameter")
    totals = engine.backward(_batches(alone, _samples(proof), state.step))
    result = engine.update(totals, proof.optimizer.learning_rate)
    found += _compared(engine, reference, state.step + 1, "parameter")
    curve = _curve(totals, result.gradient_norm)
    answer = {"curves": [curve], "differences": [asdict(difference) for difference in found]}
    write_json(folder / "resumed.json", answer)


def _compared(engine: MegatronEngine, reference: Path, step: int, what: str) -> list[Difference]:
    expected = load_file(_tensors(reference, step, what))
    value = gradient_value if what == "gradient" else parameter_value
    return differences(engine, expected, value, step, what)


def write_folder(engine: MegatronEngine, folder: Path) -> None:
    """Writes a model as a Hugging Face folder; collective."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    export(engine.chunks, engine.architecture, engine.vocabulary, folder)


def exports_apart(expected: Path, folder: Path, step: int) -> list[Difference]:
    """Two Hugging Face folders, tensor by tensor; one that is missing is infinitely far."""
    ours, theirs = _whole_folder(folder), _whole_folder(expected)
    found = []
    for name in sorted({*ours, *theirs}):
        if name in ours and name in theirs and ours[name].shape == theirs[name].shape:
            apart = float((ours[name] - theirs[name]).abs().nan_to_num(torch.inf).max())
        else:
            apart = float("inf")
        scale = float(theirs[name].abs().max()) if name in theirs else 0.0
        found.append(Difference(step, 0, "export", name, 0, "", apart, scale))
    if read_json(folder / "config.json") != read_json(expected / "config.json"):
        found.append(Difference(step, 0, "export", "config.json", 0, "", float("inf"), 0.0))
    return found


def _whole_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
