"""Answers and what they were worth, a line of JSON each."""

import json
from collections.abc import Sequence
from pathlib import Path

from llmscale.artifacts import write_text
from llmscale.rlhf.answers import Answer
from llmscale.rlhf.scoring import Scores


class AnswerLog:
    """Appends answers to a file; on a resume, those past the resumed step are taken out."""

    def __init__(self, file: Path, resumed_step: int) -> None:
        kept = [
            line
            for line in (file.read_text(encoding="utf-8").splitlines() if file.exists() else ())
            if json.loads(line)["step"] <= resumed_step and resumed_step
        ]
        write_text(file, "".join(f"{line}\n" for line in kept))
        self._file = file

    def add(self, step: int, answers: Sequence[Answer], scores: Scores) -> None:
        """Notes the answers of a step."""
        with self._file.open("a", encoding="utf-8") as file:
            for number, answer in enumerate(answers):
                parts = {name: part[number] for name, part in scores.parts.items()}
                line = {
                    "step": step,
                    "prompt": answer.prompt.text,
                    "answer": answer.text,
                    "reward": scores.total_n[number],
                    **{f"reward_{name}": score for name, score in parts.items()},
                }
                file.write(json.dumps(line) + "\n")
