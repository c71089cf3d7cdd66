"""TRL's PPO, GRPO and RLOO on the task of ``rlhf.py``, which runs this in TRL's environment.

Prints one JSON list: of each iteration, the seconds since the one before (or since training
began) and the mean reward of its answers.

    python benchmarks/rlhf_trl.py ALGORITHM SETTINGS.json

Shape legend: b answers, s tokens of a prompt with its answer, h hidden size.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    set_seed,
)


class Watch(TrainerCallback):
    """Notes how long each iteration lasted, and what its answers were worth."""

    def __init__(self) -> None:
        self.iterations: list[dict[str, float]] = []
        self.rewards: list[float] = []
        self._begun = 0.0

    def on_train_begin(self, *_arguments: Any, **_options: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, *_arguments: Any, **_options: Any) -> None:
        now = time.perf_counter()
        mean = sum(self.rewards) / len(self.rewards)
        self.iterations.append({"seconds": now - self._begun, "reward": mean})
        self.rewards.clear()
        self._begun = now


class ShareAsModel(torch.nn.Module):
    """The share of one token in an answer, in the form of a reward model, which PPO asks for.

    TRL takes the hidden states of ``base_model_prefix``, and ``score`` of them at an answer's
    last token.
    """

    base_model_prefix = "counting"

    def __init__(self, wanted: int, prompt_tokens: int, answer_tokens: int, watch: Watch) -> None:
        super().__init__()
        self.counting = Counting(wanted, prompt_tokens, answer_tokens, watch)
        self.score = torch.nn.Identity()


class Counting(torch.nn.Module):
    """Counts a token from the prompt's end to each place."""

    def __init__(self, wanted: int, prompt_tokens: int, answer_tokens: int, watch: Watch) -> None:
        super().__init__()
        self._wanted, self._before, self._most = wanted, prompt_tokens, answer_tokens
        self._watch = watch

    def forward(self, input_ids: torch.Tensor, **_options: Any) -> SimpleNamespace:
        found_bs = input_ids == self._wanted
        found_bs[:, : self._before] = False
        share_bs = found_bs.cumsum(1) / self._most
        self._watch.rewards += share_bs[:, -1].tolist()
        return SimpleNamespace(hidden_states=[share_bs[..., None]])


def common(settings: dict[str, Any]) -> dict[str, Any]:
    """What all trainers are told."""
    return {
        "output_dir": settings["folder"],
        "seed": settings["seed"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "adam_epsilon": settings["epsilon"],
        "per_device_train_batch_size": settings["samples"],
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "temperature": 1.0,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def proximal(settings: dict[str, Any], watch: Watch) -> Any:
    """The trainer of TRL's PPO."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    folder, length = settings["model"], settings["answer_tokens"]
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    asked = [{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in settings["prompts"]]
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    critic = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    tokens = len(asked[0]["input_ids"])
    wanted = tokenizer.convert_tokens_to_ids(settings["wanted"])
    config = PPOConfig(
        **common(settings),
        total_episodes=settings["samples"] * settings["iterations"],
        num_ppo_epochs=settings["passes"],
        num_mini_batches=1,
        local_rollout_forward_batch_size=settings["samples"],
        response_length=length,
        kl_coef=settings["kl"],
        num_sample_generations=0,
    )
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=ShareAsModel(wanted, tokens, length, watch),
        value_model=critic,
        train_dataset=Dataset.from_list(asked),
        eval_dataset=Dataset.from_list(asked),
        callbacks=[watch],
    )


def grouped(algorithm: str, settings: dict[str, Any], watch: Watch) -> Any:
    """The trainer of TRL's GRPO or RLOO."""
    import trl

    def share(completions: list[str], **_columns: Any) -> list[float]:
        length = settings["answer_tokens"]
        found = [text.split().count(settings["wanted"]) / length for text in completions]
        watch.rewards += found
        return found

    name = algorithm.upper()
    config = getattr(trl, f"{name}Config")(
        **common(settings),
        max_steps=settings["iterations"],
        num_generations=settings["answers"],
        max_completion_length=settings["answer_tokens"],
        beta=settings["kl"],
        logging_strategy="no",
    )
    return getattr(trl, f"{name}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(settings["model"]),
        args=config,
        reward_funcs=share,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in settings["prompts"]]),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        callbacks=[watch],
    )


def main(algorithm: str, file: str) -> None:
    """Trains, and prints the iterations."""
    settings = json.loads(Path(file).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    set_seed(settings["seed"])
    watch = Watch()
    trainer = (
        proximal(settings, watch) if algorithm == "ppo" else grouped(algorithm, settings, watch)
    )
    trainer.train()
    print(json.dumps(watch.iterations))


if __name__ == "__main__":
    main(*sys.argv[1:])
