"""PPO in plain PyTorch, for one process: what every layout has to come to.

Written after "The N Implementation Details of RLHF with PPO" and the papers it names, with
transformers' models and none of the package's own mathematics.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

TokenLists = list[list[int]]


@dataclass
class Answered:
    """One iteration's prompts, answers and scores."""

    prompts: TokenLists
    answers: TokenLists
    scores: list[float]


class PlainPpo:
    """A policy, its reference and a critic.

    Args:
        critic: a folder of a model that scores texts.
    """

    def __init__(
        self,
        policy: Path,
        critic: Path,
        *,
        rate: float,
        beta: float,
        temperature: float,
        clip: float,
    ) -> None:
        self.policy = AutoModelForCausalLM.from_pretrained(policy)
        self.reference = AutoModelForCausalLM.from_pretrained(policy)
        self.critic = AutoModelForSequenceClassification.from_pretrained(critic, num_labels=1)
        self.beta, self.temperature, self.clip = beta, temperature, clip
        self.optimizers = {
            model: torch.optim.AdamW(
                model.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0
            )
            for model in (self.policy, self.critic)
        }

    def learn(self, answered: Answered, passes: int) -> list[dict[str, float]]:
        """Passes over the answers, one update each; what the last one of each pass was."""
        with torch.no_grad():
            before = [self._probabilities(self.policy, *pair) for pair in pairs(answered)]
            anchors = [self._probabilities(self.reference, *pair) for pair in pairs(answered)]
            expected = [self._values(*pair) for pair in pairs(answered)]
        gains = []
        for own, anchor, value, score in zip(
            before, anchors, expected, answered.scores, strict=True
        ):
            rewards = -self.beta * (own - anchor)
            rewards[-1] += score
            gains.append(_advantages(rewards, value))
        wanted = [gain + value for gain, value in zip(gains, expected, strict=True)]
        flat = torch.cat(gains)
        mean, deviation = flat.mean(), (flat.var(unbiased=False) + 1e-8).sqrt()
        gains = [(gain - mean) / deviation for gain in gains]
        return [self._pass(answered, before, gains, expected, wanted) for _ in range(passes)]

    def _pass(
        self,
        answered: Answered,
        before: list[Tensor],
        gains: list[Tensor],
        expected: list[Tensor],
        wanted: list[Tensor],
    ) -> dict[str, float]:
        policy_losses, value_losses = [], []
        for number, pair in enumerate(pairs(answered)):
            ratio = (self._probabilities(self.policy, *pair) - before[number]).exp()
            gain = gains[number]
            policy_losses.append(-torch.min(gain * ratio, gain * ratio.clamp(0.8, 1.2)))
            value = self._values(*pair)
            near = expected[number] + (value - expected[number]).clamp(-0.2, 0.2)
            errors = torch.max((value - wanted[number]) ** 2, (near - wanted[number]) ** 2)
            value_losses.append(0.5 * errors)
        told = {}
        for name, model, losses in (
            ("", self.policy, policy_losses),
            ("value_", self.critic, value_losses),
        ):
            loss = torch.cat(losses).mean()
            self.optimizers[model].zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            self.optimizers[model].step()
            told[f"{name}loss"] = loss.item()
            if not name:
                told["gradient_norm"] = norm.item()
        return told

    def _probabilities(
        self, model: torch.nn.Module, prompt: list[int], answer: list[int]
    ) -> Tensor:
        return probabilities(model, prompt, answer, self.temperature)

    def _values(self, prompt: list[int], answer: list[int]) -> Tensor:
        hidden = self.critic.model(torch.tensor([prompt + answer])).last_hidden_state[0]
        scores: Tensor = self.critic.score(hidden)[len(prompt) - 1 : -1, 0]
        return scores


def probabilities(
    model: torch.nn.Module, prompt: list[int], answer: list[int], temperature: float
) -> Tensor:
    """The logarithms of an answer's tokens' probabilities."""
    logits = model(torch.tensor([prompt + answer])).logits[0] / temperature
    chosen = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return chosen.gather(1, torch.tensor(answer)[:, None])[:, 0]


def pairs(answered: Answered) -> list[tuple[list[int], list[int]]]:
    return list(zip(answered.prompts, answered.answers, strict=True))


def _advantages(rewards: Tensor, values: Tensor) -> Tensor:
    """Generalized advantages of one answer, backwards; gamma 1, lambda 0.95."""
    found, carried = [], 0.0
    for at in reversed(range(len(rewards))):
        following = values[at + 1] if at + 1 < len(values) else 0.0
        carried = rewards[at] + following - values[at] + 0.95 * carried
        found.append(carried)
    return torch.stack(found[::-1])
