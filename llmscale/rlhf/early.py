"""Answers that are begun while the policy still learns from those before."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from llmscale.artifacts import write_text
from llmscale.data.prompts import Prompt
from llmscale.rlhf.answers import Answer
from llmscale.rlhf.remote import RemoteRollout
from llmscale.training.engine import Writing

FILE = "early_answers.json"
ANSWERS = TypeAdapter(list[Answer])


class EarlyAnswers:
    """The answers to the next iteration's prompts, once they are there; a part of checkpoints.

    They are of the policy one update ago, so that a resumed run cannot ask for them again.
    """

    def __init__(self, rollout: RemoteRollout) -> None:
        self._rollout = rollout
        self._begun = False
        self._waiting: list[Answer] | None = None

    def begin(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> None:
        """Has the next iteration's prompts answered while the policy learns; collective."""
        self._rollout.begin(prompts, keys)
        self._begun = True

    def finish(self) -> None:
        """Waits for what was begun, if anything was; collective."""
        if self._begun:
            self._waiting, self._begun = self._rollout.finish(), False

    def taken(self) -> list[Answer] | None:
        """The answers that wait, if any; they are to be learned from now."""
        answers, self._waiting = self._waiting, None
        return answers

    def writing(self, folder: Path) -> "EarlyAnswersWriting":
        """Takes a copy of what waits, to be written into a folder that is there."""
        return EarlyAnswersWriting(self._waiting or [], folder / FILE)

    def load(self, folder: Path) -> None:
        """Restores what waited."""
        self._waiting = ANSWERS.validate_json((folder / FILE).read_bytes()) or None


class EarlyAnswersWriting(Writing):
    """Answers on their way into a file."""

    def __init__(self, answers: list[Answer], file: Path) -> None:
        self._answers, self._file = answers, file

    def write(self) -> None:
        """Writes the file; may be called in a thread."""
        write_text(self._file, ANSWERS.dump_json(self._answers).decode())

    def files(self) -> list[Path]:
        """What was written."""
        return [self._file]

    def finish(self) -> None:
        """Nothing is left to do."""
