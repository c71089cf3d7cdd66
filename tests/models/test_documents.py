"""Documents packed into one sample and kept apart are as each would be alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmscale.training.objectives import Causal
from tests.models.test_huggingface import TINY, saved
from tests.ranks import layout_ranks, run_ranks
from tests.training import programs

DOCUMENT_END = 0
LENGTHS = (9, 14, 5, 4)
"""Tokens of each document with its end; the last one is cut off by the sample's."""


@pytest.mark.ranks
@pytest.mark.parametrize("layout", [{}, {"context": 2}, {"tensor": 2, "context": 2}], ids=str)
def test_each_document_has_the_logits_it_has_alone(layout: dict[str, Any], tmp_path: Path) -> None:
    models = {name: saved(tmp_path / name, TINY[name]) for name in ("llama", "gpt2")}
    random = torch.Generator().manual_seed(1)
    documents = [torch.randint(1, 301, (length,), generator=random) for length in LENGTHS]
    for document in documents[:-1]:
        document[-1] = DOCUMENT_END
    window = torch.cat([*documents, torch.tensor([7])]).tolist()
    cases = [
        {"source": str(tmp_path / name), "file": str(tmp_path / f"{name}.safetensors")}
        | {"window": window, "document_end": DOCUMENT_END}
        for name in models
    ]
    ranks = layout_ranks(layout)
    run_ranks(programs.huggingface_round_trips, ranks, tmp_path / "run", layout=layout, cases=cases)
    for name, model in models.items():
        ours = load_file(tmp_path / f"{name}.safetensors")["logits"][0]
        with torch.no_grad():
            alone = torch.cat([model(document[None]).logits[0] for document in documents])
        torch.testing.assert_close(ours, alone, atol=1e-4, rtol=0, msg=name)


def test_the_first_token_of_a_document_is_not_predicted_from_the_one_before() -> None:
    window = np.array([[5, 6, DOCUMENT_END, 7, 8, 9, DOCUMENT_END, 4, 3]])
    batch = Causal(DOCUMENT_END).batch(window, [0], torch.device("cpu"))
    assert batch.mask_bs.tolist() == [[1, 1, 0, 1, 1, 1, 0, 1]]
    assert batch.positions_bs.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert batch.segments_bs is not None
    assert batch.segments_bs.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2]]
