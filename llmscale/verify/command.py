"""``llmscale verify``: a checked recipe proven, or one of its ranks built at true size."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from llmscale.errors import Disagreement, RecipeError, StageError
from llmscale.recipe.recipe import load_recipe
from llmscale.stages.pretrain import Pretrain
from llmscale.stages.tuned import vocabulary_of
from llmscale.verify.proof import Proof
from llmscale.verify.prove import prove_recipe, proven_stages
from llmscale.verify.table import layout_in_words, plain, plain_exact, show_exact, show_proven

MOST_RANKS = (8, 16)


def verify(
    recipe: Path, overrides: Sequence[str], *, steps: int, ranks: int, console: Console
) -> dict[str, Any]:
    """Proves a recipe's layouts on this machine's CPU and prints a table of each.

    Raises:
        RecipeError: if the recipe or the call is wrong.
        StageError: if a layout differs from one rank, or a rank failed.
    """
    loaded = load_recipe(recipe, overrides)
    if ranks not in MOST_RANKS:
        raise RecipeError(f"--ranks: {ranks} is no choice; use 8 or 16")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with console.status("verify") as status:

        def on_proof(stage: str, proof: Proof) -> None:
            status.update(f"{stage}: {layout_in_words(proof)}, {proof.ranks} ranks")

        proven = prove_recipe(loaded, steps=steps, most_ranks=ranks, on_proof=on_proof)
    show_proven(console, proven)
    wrong = next((one for one in proven if not one.agrees), None)
    if wrong is not None:
        words = layout_in_words(wrong.proof)
        raise Disagreement(f"{wrong.stage}: {words}: {wrong.failure()}", plain(proven))
    return plain(proven)


def verify_exact_rank(
    recipe: Path, overrides: Sequence[str], rank: int, console: Console
) -> dict[str, Any]:
    """Builds one rank of each training stage at its true size and prints what it holds.

    Raises:
        RecipeError: if the recipe or the call is wrong.
        StageError: if the stages together are not the architecture.
    """
    loaded = load_recipe(recipe, overrides)
    stages = {
        name: stage for name, stage in proven_stages(loaded).items() if isinstance(stage, Pretrain)
    }
    if not stages:
        raise RecipeError(
            f"{recipe}: --exact-rank builds what stages of kind pretrain train, and there is none; "
            "leave it out"
        )
    import llmscale.quiet  # noqa: F401
    from llmscale.verify.exact import exact_rank

    answers = {}
    for name, stage in stages.items():
        exact = exact_rank(stage, vocabulary_of(stage, loaded.stages), rank, loaded.cluster.ranks)
        show_exact(console, exact)
        if exact.total_parameters != exact.expected_parameters:
            raise StageError(
                f"{name}: the stages hold {exact.total_parameters:,} parameters, but the "
                f"architecture has {exact.expected_parameters:,}"
            )
        answers[name] = plain_exact(exact)
    return answers
