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
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", [{}, {"context": 2}, {"tensor": 2, "context": 2}], ids=str)
def test_each_document_has_the_logits_it_has_alone(
    name: str, layout: dict[str, Any], tmp_path: Path
) -> None:
    model = saved(tmp_path / "in", TINY[name])
    random = torch.Generator().manual_seed(1)
    documents = [torch.randint(1, 301, (length,), generator=random) for length in LENGTHS]
    for document in documents[:-1]:
        document[-1] = DOCUMENT_END
    window = torch.cat([*documents, torch.tensor([7])])
    run_ranks(
        programs.huggingface_round_trip,
        layout_ranks(layout),
        tmp_path / "run",
        source=str(tmp_path / "in"),
        layout=layout,
        window=window.tolist(),
        document_end=DOCUMENT_END,
        file=str(tmp_path / "out.safetensors"),
    )
    ours = load_file(tmp_path / "out.safetensors")["logits"][0]
    with torch.no_grad():
        alone = torch.cat([model(document[None]).logits[0] for document in documents])
    torch.testing.assert_close(ours, alone, atol=1e-4, rtol=0)


def test_the_first_token_of_a_document_is_not_predicted_from_the_one_before() -> None:
    window = np.array([[5, 6, DOCUMENT_END, 7, 8, 9, DOCUMENT_END, 4, 3]])
    batch = Causal(DOCUMENT_END).batch(window, [0], torch.device("cpu"))
    assert batch.mask_bs.tolist() == [[1, 1, 0, 1, 1, 1, 0, 1]]
    assert batch.positions_bs.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert batch.segments_bs is not None
    assert batch.segments_bs.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2]]
