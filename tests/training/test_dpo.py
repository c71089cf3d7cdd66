"""Preference training equals a plain loop over single texts, at any layout."""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from llmscale.artifacts import RunFolder
from llmscale.data.chat import Example
from llmscale.data.groups import Group
from llmscale.stages.dpo_training import preference_training
from tests.ranks import run_recipe
from tests.training.judged import LAYOUTS, judged_home, logged, steps_of, trained_alone

pytestmark = pytest.mark.ranks

BETA = 0.2
STAGE = """
    kind: dpo
    beta: 0.2
    data:
      pairs: {path: pairs.jsonl, weight: 2}
      rankings: {path: rankings.jsonl}
"""
KTO = """
    kind: dpo
    loss: kto
    beta: 0.2
    desirable_weight: 1.5
    data: {labels: {path: labels.jsonl, weight: 2}, pairs: {path: pairs.jsonl}}
"""
ALONGSIDE = "stages.judged.reference=alongside"
WAYS: dict[str, tuple[str, list[str]]] = {
    **{name: ("sigmoid", overrides) for name, overrides in LAYOUTS.items()},
    "alongside, tensor 2, pipeline 2": ("sigmoid", [*LAYOUTS["tensor 2, pipeline 2"], ALONGSIDE]),
    "alongside, ZeRO 3": ("sigmoid", [*LAYOUTS["ZeRO 3"], ALONGSIDE]),
    "IPO, data 2": ("ipo", LAYOUTS["data 2"]),
    "IPO, ZeRO 2": ("ipo", LAYOUTS["ZeRO 2"]),
    "KTO, one rank": ("kto", LAYOUTS["one rank"]),
    "KTO, tensor 2, pipeline 2": ("kto", LAYOUTS["tensor 2, pipeline 2"]),
    "KTO, alongside, ZeRO 1": ("kto", [*LAYOUTS["ZeRO 1"], ALONGSIDE]),
}


class Plain:
    """transformers' model beside a copy of it that stays as it was."""

    def __init__(self, home: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32)
        self.reference = copy.deepcopy(self.model).requires_grad_(False)

    def ratio(self, text: Example) -> torch.Tensor:
        """log pi(answer) - log reference(answer), the text alone in its pass."""
        tokens = torch.tensor(text.tokens_n.astype(np.int64))
        said = torch.tensor(text.learned_n)[1:]

        def log_probability(model: torch.nn.Module) -> torch.Tensor:
            logs_nv = model(tokens[None]).logits[0, :-1].log_softmax(-1)
            return logs_nv.gather(1, tokens[1:, None])[said].sum()

        return log_probability(self.model) - log_probability(self.reference)

    def sigmoid(self, groups: Sequence[Group]) -> torch.Tensor:
        ratios = [[self.ratio(text) for text in group.texts] for group in groups]
        return torch.stack([-logsigmoid(BETA * (chosen - other)) for chosen, other in ratios])

    def ipo(self, groups: Sequence[Group]) -> torch.Tensor:
        losses = []
        for group in groups:
            chosen, other = (self.ratio(text) / text.learned_n.sum() for text in group.texts)
            losses.append((chosen - other - 1 / (2 * BETA)) ** 2)
        return torch.stack(losses)

    def kto(self, groups: Sequence[Group]) -> torch.Tensor:
        with torch.no_grad():
            kl = torch.stack([self.ratio(group.texts[1]) for group in groups]).mean().clamp(min=0)
        losses = []
        for group in groups:
            ratio = self.ratio(group.texts[0])
            if group.target:
                losses.append(1.5 * (1 - torch.sigmoid(BETA * (ratio - kl))))
            else:
                losses.append(1 - torch.sigmoid(BETA * (kl - ratio)))
        return torch.stack(losses)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judged_home(tmp_path_factory.mktemp("pairs"), STAGE)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judged_home(tmp_path_factory.mktemp("labels"), KTO)


def run(home: Path, folder: Path, *overrides: str) -> RunFolder:
    return run_recipe(home / "recipe.yaml", folder, list(overrides))


@pytest.mark.parametrize("name", WAYS)
def test_preferences_are_learned_as_by_a_plain_loop(
    name: str, pairs: Path, labels: Path, tmp_path: Path
) -> None:
    loss, overrides = WAYS[name]
    home = labels if loss == "kto" else pairs
    overrides = [*overrides, f"stages.judged.loss={loss}"]
    folder = run(home, tmp_path, *overrides)
    plain = Plain(home)
    steps = steps_of(home, folder, preference_training, *overrides)
    curve = trained_alone(list(plain.model.parameters()), steps, getattr(plain, loss))
    assert np.array(logged(folder)) == pytest.approx(np.array(curve), rel=2e-5)
    wanted = plain.model.state_dict()
    hf = folder.stage("judged").hf
    assert folder.stage("judged").manifest()["metrics"]["best_step"] == 4
    found = AutoModelForCausalLM.from_pretrained(hf).state_dict()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5, msg=key)


def test_at_first_the_model_is_its_own_reference(pairs: Path, tmp_path: Path) -> None:
    folder = run(pairs, tmp_path, "stages.judged.steps=1")
    first = folder.stage("judged").metrics()[0]
    assert first["validation_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["validation_chosen_reward"] == pytest.approx(0, abs=1e-5)
