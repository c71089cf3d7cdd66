"""A reward model learns as a plain loop over single texts does, at any layout."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from llmscale.artifacts import RunFolder
from llmscale.data.groups import Group
from llmscale.evaluation.reward_models import RewardModel
from llmscale.models.score_head import new_head
from llmscale.stages.reward_training import reward_training
from tests.ranks import run_recipe
from tests.training.judged import LAYOUTS, Curve, judged_home, logged, steps_of, trained_alone
from tests.training.judged import about as about_run

pytestmark = pytest.mark.ranks

STAGE = """
    kind: reward
    data:
      pairs: {path: pairs.jsonl, weight: 2}
      rankings: {path: rankings.jsonl, head: short}
    heads: [good, short]
    centering: 0.05
"""
SCORES = """
    kind: reward
    data: {scores: {path: scores.jsonl, score_range: [-4, 4]}}
"""


class Plain(torch.nn.Module):
    """transformers' model and a head, with the first weights that a stage has."""

    def __init__(self, home: Path, heads: int) -> None:
        super().__init__()
        self.below = AutoModel.from_pretrained(home / "base", dtype=torch.float32)
        hidden = self.below.config.hidden_size
        self.score = torch.nn.Parameter(new_head(heads, hidden, seed=7))

    def scores(self, group: Group) -> list[torch.Tensor]:
        """The score of each text, alone in its pass, by the group's head."""
        found = []
        for text in group.texts:
            tokens = torch.tensor(text.tokens_n[None].astype(np.int64))
            hidden_h = self.below(tokens).last_hidden_state[0, -1]
            found.append(self.score[group.head] @ hidden_h)
        return found


def compared(plain: Plain, groups: Sequence[Group]) -> torch.Tensor:
    """Each group's mean over its pairs of -log sigmoid(better - worse - margin), centred."""
    losses = []
    for group in groups:
        pairs = combinations(plain.scores(group), 2)
        each = [
            -torch.log(torch.sigmoid(better - worse - group.margin)) + 0.05 * (better + worse) ** 2
            for better, worse in pairs
        ]
        losses.append(torch.stack(each).mean())
    return torch.stack(losses)


def run(home: Path, folder: Path, *overrides: str) -> RunFolder:
    return run_recipe(home / "recipe.yaml", folder, list(overrides))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judged_home(tmp_path_factory.mktemp("reward"), STAGE)


@pytest.fixture(scope="module")
def alone(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Curve, Plain, RunFolder]:
    """The curve of a plain loop, the model it leaves, and the run at one rank."""
    folder = run(home, tmp_path_factory.mktemp("alone"), *LAYOUTS["one rank"])
    plain = Plain(home, heads=2)
    steps = steps_of(home, folder, reward_training)
    curve = trained_alone(list(plain.parameters()), steps, lambda groups: compared(plain, groups))
    return curve, plain, folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_reward_model_learns_as_a_plain_loop_does(
    name: str, home: Path, alone: tuple[Curve, Plain, RunFolder], tmp_path: Path
) -> None:
    curve, plain, one_rank = alone
    folder = one_rank if name == "one rank" else run(home, tmp_path, *LAYOUTS[name])
    assert np.array(logged(folder)) == pytest.approx(np.array(curve), rel=1e-5)
    hf = folder.stage("judged").hf
    found = AutoModelForSequenceClassification.from_pretrained(hf).state_dict()
    wanted = {f"model.{name}": one for name, one in plain.below.state_dict().items()}
    wanted["score.weight"] = plain.score.data
    last = about_run(folder, "manifest.json")["metrics"]
    assert last["best_step"] == 4, "the plain loop's weights are those of the last step"
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5, msg=key)


def test_a_new_head_is_drawn_with_a_spread_of_one_over_the_root_of_the_width_plus_one() -> None:
    head = new_head(100, 1023, seed=1)
    assert head.std().item() == pytest.approx(1 / 32, rel=0.01)
    assert head.mean().item() == pytest.approx(0, abs=1e-3)


def test_scores_are_learned_by_regression(tmp_path: Path) -> None:
    home = judged_home(tmp_path, SCORES)
    folder = run(home, tmp_path / "run", *LAYOUTS["tensor 2"])
    steps = steps_of(home, folder, reward_training, *LAYOUTS["tensor 2"])
    plain = Plain(home, heads=1)
    targets = [float(line) for line in _targets(home)]
    mean, spread = np.mean(targets), np.std(targets)

    def squares(groups: Sequence[Group]) -> torch.Tensor:
        wanted = torch.tensor([(group.target - mean) / spread for group in groups])
        return (torch.stack([plain.scores(group)[0] for group in groups]) - wanted) ** 2

    curve = trained_alone(list(plain.parameters()), steps, squares)
    assert np.array(logged(folder)) == pytest.approx(np.array(curve), rel=1e-5)


def _targets(home: Path) -> list[float]:
    import json

    return [json.loads(line)["score"] for line in (home / "scores.jsonl").read_text().splitlines()]


def test_normalized_scores_have_mean_0_and_variance_1_on_the_reference_samples(
    home: Path, alone: tuple[Curve, Plain, RunFolder]
) -> None:
    _, _, folder = alone
    groups = [group for step in steps_of(home, folder, reward_training) for group in step]
    texts = [text for group in groups for text in group.texts if group.head == 0]
    model = RewardModel(folder.stage("judged").hf)
    assert model.heads == ("good", "short")
    told = about_run(folder, "scores.json")
    assert told["before"].keys() == told["after"].keys() == {"good", "short"}
    scores = model.scores([text.tokens_n.tolist() for text in texts])[:, 0]
    assert abs(scores.mean()) < 0.5 and 0.5 < scores.std() < 2, "of a part of those samples"
    raw = scores * model._spread_k[0] + model._mean_k[0]
    assert told["after"]["good"]["mean"] == pytest.approx(model._mean_k[0])
    assert raw.min() >= told["after"]["good"]["least"] - 1e-5


def test_a_score_depends_on_neither_padding_nor_what_else_is_in_the_batch(
    alone: tuple[Curve, Plain, RunFolder],
) -> None:
    _, _, folder = alone
    hf = folder.stage("judged").hf
    ours, theirs = RewardModel(hf), AutoModelForSequenceClassification.from_pretrained(hf)
    tokenizer = AutoTokenizer.from_pretrained(hf)
    texts = [ours.tokens("what is up?", "the sky"), ours.tokens("", "the sea and the sky is down")]
    together = ours.scores(texts)
    singly = np.concatenate([ours.scores([text]) for text in texts])
    assert together == pytest.approx(singly, abs=1e-5)
    padding = theirs.config.pad_token_id
    assert padding != tokenizer.eos_token_id
    for side in ("left", "right"):
        room = max(map(len, texts)) + 3
        rows, masks = [], []
        for text in texts:
            filler = [padding] * (room - len(text))
            rows.append(filler + text if side == "left" else text + filler)
            unseen, seen = [0] * len(filler), [1] * len(text)
            masks.append(unseen + seen if side == "left" else seen + unseen)
        mask = torch.tensor(masks)
        positions = (mask.cumsum(1) - mask).clamp(min=0)
        with torch.no_grad():
            found = theirs(torch.tensor(rows), attention_mask=mask, position_ids=positions).logits
        assert (found.numpy() - ours._mean_k) / ours._spread_k == pytest.approx(singly, abs=1e-5)
