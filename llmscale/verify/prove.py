"""A recipe's layout run on CPU ranks and at one rank, and shown equal number by number."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmscale.artifacts import read_json, write_json
from llmscale.clusters.base import Job, Task
from llmscale.clusters.local import LocalCluster
from llmscale.errors import RecipeError, StageError
from llmscale.recipe.recipe import Recipe
from llmscale.stages.ppo import Ppo
from llmscale.stages.pretrain import Pretrain
from llmscale.verify.proof import Proof, learning_proofs, proofs
from llmscale.verify.rank import LAYOUT, PROOF, REFERENCE, RESUMED, prove_rank
from llmscale.verify.verdict import (
    Check,
    curve_checks,
    figure_checks,
    low_precision_checks,
    tensor_check,
)


@dataclass(frozen=True)
class Proven:
    """One layout's checks."""

    stage: str
    proof: Proof
    checks: tuple[Check, ...]

    @property
    def agrees(self) -> bool:
        """Whether all checks hold."""
        return all(check.agrees for check in self.checks)

    def failure(self) -> str:
        """The first check that does not hold, in one line."""
        wrong = [check for check in self.checks if not check.agrees]
        first, tensors = wrong[0], [check for check in wrong if ": " in check.where]
        told = f"{first.name} differs by {first.worst:.2g} {first.where}".rstrip()
        if tensors and tensors[0] is not first:
            told += f"; {tensors[0].name} {tensors[0].where}"
        return told


def proven_stages(recipe: Recipe) -> dict[str, Pretrain | Ppo]:
    """The stages whose layouts are proven.

    Raises:
        RecipeError: if there is none.
    """
    found = {
        name: stage
        for name, stage in recipe.stages.items()
        if isinstance(stage, Pretrain | Ppo) and stage.engine == "megatron"
    }
    for name, stage in found.items():
        if isinstance(stage, Ppo) and stage.adapter is not None:
            raise RecipeError(
                f"{recipe.name}: stages.{name}.adapter: layouts are proven of whole models; remove "
                f"it for the proof: stages.{name}.adapter=null"
            )
    if not found:
        raise RecipeError(
            f"{recipe.name}: no stage of kind pretrain or ppo has engine megatron, whose layouts "
            "are what is proven; add one"
        )
    return found


def prove_recipe(
    recipe: Recipe,
    *,
    steps: int,
    most_ranks: int,
    on_proof: Callable[[str, Proof], None] = lambda stage, proof: None,
) -> list[Proven]:
    """Proves each training stage's layout, at every choice of degrees that fits.

    Raises:
        RecipeError: if no stage of the recipe trains.
        StageError: if a rank failed.
    """
    found = []
    for name, stage in proven_stages(recipe).items():
        for proof in _proofs(recipe, stage, steps, most_ranks):
            on_proof(name, proof)
            proven = prove(name, proof)
            low = stage.precision in ("bf16", "fp8") and proof.learning is None
            found.append(_with_low_precision(proven) if low else proven)
    return found


def _proofs(recipe: Recipe, stage: Pretrain | Ppo, steps: int, most_ranks: int) -> list[Proof]:
    ranks = recipe.cluster.ranks
    if isinstance(stage, Pretrain):
        return proofs(stage, ranks, steps=steps, most_ranks=most_ranks)
    model, policy = stage.architecture(recipe.stages), stage.layouts(ranks)[0]
    own = policy.model_ranks * policy.data_ranks(ranks)
    return learning_proofs(stage, model, own, steps=steps, most_ranks=most_ranks)


def prove(stage: str, proof: Proof) -> Proven:
    """Runs a proof's tasks and compares; its folder is kept only if a rank failed.

    Raises:
        StageError: if a rank failed; names it, the cause, and its log.
    """
    with _folder() as folder:
        _run(folder, proof, [REFERENCE, LAYOUT, RESUMED])
        told = checks(folder) if proof.learning is None else learning_checks(folder)
        return Proven(stage, proof, tuple(told))


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="llmscale-verify-"))
    try:
        yield folder
    except StageError:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _run(folder: Path, proof: Proof, tasks: list[str]) -> None:
    (folder / "proof").mkdir(exist_ok=True)
    write_json(folder / "proof" / PROOF, proof.model_dump(mode="json", by_alias=True))
    for task in tasks:
        ranks = proof.ranks if task == LAYOUT else 1
        LocalCluster(prove_rank).run(Job(folder, "proof", Task(task, ranks)))


def checks(folder: Path) -> list[Check]:
    """What the finished tasks of a proof in ``folder`` say."""
    folder = folder / "proof"
    reference: list[dict[str, Any]] = read_json(folder / REFERENCE / "curves.json")
    layout, resumed = read_json(folder / "layout.json"), read_json(folder / "resumed.json")
    names: list[str] = read_json(folder / REFERENCE / "tensors.json")
    found = curve_checks(layout["curves"], reference[:-1])
    wrong_from = min((c.step for c in found[:2] if c.step is not None), default=None)
    for name in ("gradient", "parameter"):
        tensors = [one for one in layout["differences"] if one["what"] == name]
        found.append(tensor_check(f"{name}s", tensors, names, wrong_from))
    again = [
        tensor_check("checkpoint at one rank", resumed["differences"], names, wrong_from),
        *curve_checks(resumed["curves"], reference[-1:], len(reference)),
    ]
    told = next((check for check in again if not check.agrees), again[0])
    found.append(replace(told, name="checkpoint at one rank"))
    found.append(tensor_check("Hugging Face export", layout["export"], names, wrong_from))
    return found


def learning_checks(folder: Path) -> list[Check]:
    """What the finished tasks of a proof of learning from rewards in ``folder`` say."""
    folder = folder / "proof"
    reference: list[dict[str, Any]] = read_json(folder / REFERENCE / "curves.json")
    names: dict[str, list[str]] = read_json(folder / REFERENCE / "tensors.json")
    layout, resumed = read_json(folder / "layout.json"), read_json(folder / "resumed.json")
    found = figure_checks(layout["curves"], reference[:-1])
    wrong_from = min((c.step for c in found if c.step is not None), default=None)
    again = figure_checks(resumed["curves"], reference[-1:], len(reference))
    for role, expected in names.items():
        for told, answer in ((found, layout), (again, resumed)):
            own = [one for one in answer["differences"] if one["what"] == role]
            told.append(tensor_check(f"{role}'s parameters", own, expected, wrong_from))
    first = next((check for check in again if not check.agrees), again[0])
    found.append(replace(first, name="checkpoint at one rank"))
    export = layout["export"]
    found.append(tensor_check("Hugging Face export", export, names["policy"], wrong_from))
    return found


def _with_low_precision(proven: Proven) -> Proven:
    proof = proven.proof.model_copy(update={"precision": "bf16"})
    with _folder() as folder:
        _run(folder, proof, [REFERENCE, LAYOUT])
        ours = read_json(folder / "proof" / "layout.json")["curves"]
        reference = read_json(folder / "proof" / REFERENCE / "curves.json")[:-1]
    return replace(proven, checks=(*proven.checks, *low_precision_checks(ours, reference)))
