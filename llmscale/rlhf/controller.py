"""The loop of learning from rewards: answer, score, examine, update, synchronize, note, save.

Every rank runs it. All of them know all answers and what became of them, so that each estimate is
made alike everywhere; the models alone are split.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llmscale.data.prompts import Prompt
from llmscale.errors import Interrupted
from llmscale.rlhf.answer_log import AnswerLog
from llmscale.rlhf.answers import Answer
from llmscale.rlhf.examine import examined
from llmscale.rlhf.lesson import Lesson
from llmscale.rlhf.metrics import answer_figures
from llmscale.rlhf.policy_losses import adapted_coefficient
from llmscale.rlhf.prompts import PromptOrder, sampling_key
from llmscale.rlhf.roles import Roles
from llmscale.rlhf.scoring import Scores
from llmscale.rlhf.updates import updated
from llmscale.training.checkpoint import Checkpoints, TrainingState
from llmscale.training.log import TrainingLog
from llmscale.training.rows import RowForm
from llmscale.training.signals import StopRequest

ALARMING_DISAGREEMENT = 0.05
"""From which mean share on the rollout's probabilities are not the policy's any more."""


@dataclass(frozen=True)
class Notes:
    """What the first rank writes: metrics, some answers, and those to held-out prompts."""

    log: TrainingLog
    samples: AnswerLog
    validation: AnswerLog


@dataclass(frozen=True)
class Controller:
    """One rank's part of the loop.

    Attributes:
        held_out: prompts that are answered to see how the policy does, never to learn.
        notes: None on all ranks but the first.
        say: told what is worth a line.
    """

    lesson: Lesson
    roles: Roles
    prompts: PromptOrder
    held_out: Sequence[Prompt]
    form: RowForm
    checkpoints: Checkpoints
    stop: StopRequest
    notes: Notes | None
    say: Callable[[str], None] = print

    def learn(self, state: TrainingState) -> TrainingState:
        """Iterates from where ``state`` stands to the end; collective.

        Raises:
            Interrupted: after a checkpoint, if any rank was asked to stop.
            StageError: if scores or outputs cannot be used, or an update was not finite.
        """
        lesson = self.lesson
        if state.kl_coefficient is None:
            state = replace(state, kl_coefficient=lesson.kl.coefficient)
        self.roles.rollout.synchronize(self.roles.policy.whole_weights())
        if state.step == 0:
            self._validate(state)
        while state.step < lesson.steps:
            state = self._iterate(state)
            self.checkpoints.poll()
            stopping = self.stop.agreed(self.roles.policy.device)
            if state.step == lesson.steps or state.step % lesson.checkpointing.every == 0:
                self._validate(state)
                self._save(state, wait=stopping or state.step == lesson.steps)
            elif stopping:
                self._save(state, wait=True)
            if stopping and state.step < lesson.steps:
                raise Interrupted(f"stopped after iteration {state.step}, with a checkpoint")
        return state

    def _iterate(self, state: TrainingState) -> TrainingState:
        """One iteration, from prompts to a policy that has learned of them."""
        lesson, roles, clock = self.lesson, self.roles, Clock()
        coefficient = state.kl_coefficient or 0.0
        early = roles.early.taken() if roles.early is not None else None
        answers = early or self.answers(state)
        clock.stop("rollout_seconds")
        scores = roles.scorers.scores(answers)
        clock.stop("score_seconds")
        experience, expected, figures = examined(
            lesson, roles, self.form, answers, scores, coefficient, early=early is not None
        )
        clock.stop("examine_seconds")
        tokens = sum(len(answer.tokens) for answer in answers)
        following = replace(
            state,
            step=state.step + 1,
            consumed_samples=state.consumed_samples + lesson.rollout.prompts,
            tokens=state.tokens + tokens,
        )
        if roles.early is not None and following.step < lesson.steps:
            roles.early.begin(*self._asked(following))
        figures |= updated(lesson, roles, experience, expected, coefficient, state.step)
        clock.stop("update_seconds")
        if early is None:
            self._watch(figures["rollout_disagreement"])
        if roles.early is not None:
            roles.early.finish()
            clock.stop("waiting_seconds")
        roles.rollout.synchronize(roles.policy.whole_weights())
        clock.stop("synchronize_seconds")
        following = replace(following, kl_coefficient=self._adapted(coefficient, figures))
        figures |= clock.seconds | roles.waits()
        self._note(following, answers, scores, tokens, figures)
        return following

    def answers(self, state: TrainingState) -> list[Answer]:
        """The answers to the next prompts, those to one prompt behind each other; collective."""
        return self.roles.rollout.answers(*self._asked(state))

    def _asked(self, state: TrainingState) -> tuple[list[Prompt], list[int]]:
        """The next prompts, each as often as it is answered, and the answers' keys."""
        first, rollout = state.consumed_samples, self.lesson.rollout
        places = range(first, first + rollout.prompts)
        prompts = self.prompts.at(places)
        repeated = [prompt for prompt in prompts for _ in range(rollout.answers)]
        keys = [
            sampling_key(self.lesson.seed, "train", place, number)
            for place in places
            for number in range(rollout.answers)
        ]
        return repeated, keys

    def _adapted(self, coefficient: float, figures: dict[str, float]) -> float:
        kl = self.lesson.kl
        if kl.target is None:
            return coefficient
        answers = self.lesson.rollout.samples
        return adapted_coefficient(coefficient, figures["kl"], kl.target, answers, kl.horizon)

    def _watch(self, share: float) -> None:
        if share > ALARMING_DISAGREEMENT:
            self.say(
                f"the rollout's probabilities differ from the policy's by {share:.1%} in the "
                "mean: what is learned is biased; compare precision and versions of the two"
            )

    def _validate(self, state: TrainingState) -> None:
        """Answers held-out prompts, with the same random numbers each time; collective."""
        if not self.held_out:
            return
        numbers = range(len(self.held_out))
        keys = [sampling_key(self.lesson.seed, "validation", number) for number in numbers]
        answers = self.roles.rollout.answers(self.held_out, keys)
        scores = self.roles.scorers.scores(answers)
        if self.notes is not None:
            figures = answer_figures(answers, scores)
            told = {f"validation_{name}": value for name, value in figures.items()}
            self.notes.log.measured(state.step, **told)
            self.notes.validation.add(state.step, answers, scores)

    def _note(
        self,
        state: TrainingState,
        answers: Sequence[Answer],
        scores: Scores,
        tokens: int,
        figures: dict[str, float],
    ) -> None:
        if self.notes is None:
            return
        self.notes.log.step(state.step, tokens, state.tokens, 0.0, **figures)
        if state.step % self.lesson.samples_every == 0:
            self.notes.samples.add(state.step, answers, scores)

    def _save(self, state: TrainingState, wait: bool) -> None:
        if wait or not self.lesson.checkpointing.asynchronous:
            self.checkpoints.save(self.roles, state)
        else:
            self.checkpoints.begin(self.roles, state)
        if self.notes is not None:
            self.notes.log.paused()


class Clock:
    """How long each part of an iteration lasted."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begun = time.perf_counter()

    def stop(self, name: str) -> None:
        """Says what the time since the last call was spent on."""
        now = time.perf_counter()
        self.seconds[name], self._begun = round(now - self._begun, 4), now
