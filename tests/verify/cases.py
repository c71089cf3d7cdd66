"""Many proofs at once: the world of each size is started once for all of its cases."""

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

from llmscale.verify.proof import Proof
from llmscale.verify.prove import checks
from llmscale.verify.verdict import Check
from tests.ranks import run_ranks
from tests.verify import programs


def proof(model: dict[str, Any], **settings: Any) -> Proof:
    """A proof from plain settings; ``micro_batches`` is those of a rank in a step."""
    from llmscale.verify.proof import FFN_SIZE, INITIAL_STD, SEQUENCE_LENGTH, VOCABULARY

    layout = {"data": 1, **settings.pop("parallel", {})}
    optimizer = {"learning_rate": 1e-3, "epsilon": 1e-5, "distributed": False}
    optimizer |= settings.pop("optimizer", {})
    samples = 2 * layout["data"] * settings.pop("micro_batches", 2)
    return Proof.model_validate(
        {
            "model": {
                "layers": 4,
                "hidden_size": 32,
                "attention_heads": 4,
                "ffn_size": FFN_SIZE,
                "sequence_length": SEQUENCE_LENGTH,
                **({} if model["family"] == "t5" else {"initial_std": INITIAL_STD}),
                **model,
            },
            "vocabulary": VOCABULARY,
            "parallel": layout,
            "batch": {"global": samples, "micro": 2},
            "optimizer": optimizer,
            "steps": 2,
            **settings,
        }
    )


def run_proofs(
    cases: dict[str, Proof], folder: Path, plants: dict[str, str] | None = None
) -> dict[str, list[Check]]:
    """The checks of each case; ``plants`` names errors of ``tests.verify.plants``."""
    references: dict[str, Proof] = {}
    by_ranks: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for number, (name, one) in enumerate(cases.items()):
        plain = one.at_one_rank()
        key = hashlib.sha256(plain.model_dump_json().encode()).hexdigest()[:12]
        references[key] = plain
        by_ranks[one.ranks].append(
            {
                "name": name,
                "proof": one.model_dump(mode="json", by_alias=True),
                "folder": str(folder / f"case-{number}" / "proof"),
                "reference": str(folder / key),
                "plant": (plants or {}).get(name),
            }
        )
    plain_cases = [
        {"proof": one.model_dump(mode="json", by_alias=True), "folder": str(folder / key)}
        | {"reference": ""}
        for key, one in references.items()
    ]
    run_ranks(programs.references, 1, folder / "references", cases=plain_cases)
    for ranks, some in by_ranks.items():
        run_ranks(programs.layouts, ranks, folder / f"layouts-{ranks}", cases=some)
    every = [case for some in by_ranks.values() for case in some]
    run_ranks(programs.resumed, 1, folder / "resumed", cases=every)
    found = {}
    for case in every:
        place = Path(case["folder"])
        (place / "reference").symlink_to(case["reference"])
        found[case["name"]] = checks(place.parent)
    return found
