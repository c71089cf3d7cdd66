"""RLOO in plain PyTorch, for one process, with one update an iteration (Ahmadian et al. 2024).

With transformers' models and none of the package's own mathematics.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.rlhf.plain_ppo import Answered, pairs, probabilities


class PlainRloo:
    """A policy and its reference.

    Args:
        each: answers to a prompt, which follow each other.
    """

    def __init__(
        self, policy: Path, *, rate: float, beta: float, temperature: float, clip: float, each: int
    ) -> None:
        self.policy = AutoModelForCausalLM.from_pretrained(policy)
        # A policy may write the token that pads, too, and learns of it then.
        self.policy.get_input_embeddings().padding_idx = None
        self.reference = AutoModelForCausalLM.from_pretrained(policy)
        self.beta, self.temperature, self.clip, self.each = beta, temperature, clip, each
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0
        )

    def learn(self, answered: Answered) -> dict[str, float]:
        """One update by all answers: up with what is above the mean of a prompt's other answers."""
        own, apart = [], []
        for pair in pairs(answered):
            own.append(probabilities(self.policy, *pair, self.temperature))
            with torch.no_grad():
                anchor = probabilities(self.reference, *pair, self.temperature)
            apart.append((own[-1].detach() - anchor).sum().item())
        worth = [score - self.beta * far for score, far in zip(answered.scores, apart, strict=True)]
        losses = []
        for number, known in enumerate(own):
            first = number // self.each * self.each
            others = [worth[at] for at in range(first, first + self.each) if at != number]
            losses.append(-(worth[number] - sum(others) / len(others)) * known)
        loss = torch.cat(losses).mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.clip)
        self.optimizer.step()
        entropy = -torch.cat(own).mean()
        return {
            "kl": sum(apart) / len(apart),
            "entropy": entropy.item(),
            "gradient_norm": norm.item(),
        }
