"""The training loop: step, log, validate, save, stop."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llmscale.data.samples import rank_places
from llmscale.errors import Interrupted, StageError
from llmscale.training.batches import ModelBatch
from llmscale.training.checkpoint import Checkpoints, TrainingState
from llmscale.training.data import StepBatch, TrainingData, ValidationSamples
from llmscale.training.engine import Engine, StepResult, Totals
from llmscale.training.log import TrainingLog
from llmscale.training.schedule import learning_rate
from llmscale.training.settings import Checkpointing, Health
from llmscale.training.signals import StopRequest

SHOWN_SAMPLES = 8

Completing = Callable[[Engine, Sequence[ModelBatch]], Sequence[ModelBatch]]
"""Adds to a global batch what its loss needs to know of models before; collective."""


@dataclass
class Trainer:
    """One rank's part of training a model."""

    engine: Engine
    data: TrainingData
    validation: ValidationSamples | None
    steps: int
    patience: int | None
    baseline: bool
    micro_batch: int
    checkpointing: Checkpointing
    health: Health
    checkpoints: Checkpoints
    stop: StopRequest
    log: TrainingLog | None
    completing: Completing | None = None
    say: Callable[[str], None] = print

    def train(self, state: TrainingState) -> TrainingState:
        """Trains from where ``state`` stands to the end; collective.

        Raises:
            Interrupted: after a checkpoint, if any rank was asked to stop.
            StageError: if too many steps in a row were not finite.
        """
        if self.baseline and state.step == 0:
            self._tell_baseline()
        nonfinite = 0
        while not self._done(state):
            batch = self.data.at(state.step, state.consumed_samples)
            result = self._step(batch, state.step)
            healthy = result.applied or result.overflowed
            nonfinite = 0 if healthy else nonfinite + 1
            if not healthy:
                self._tell_nonfinite(batch, state.step, result, nonfinite)
            state = replace(
                state,
                step=state.step + 1,
                consumed_samples=state.consumed_samples + batch.size,
                tokens=state.tokens + batch.tokens,
            )
            self._log_step(batch, state, result)
            self.checkpoints.poll()
            stopping = self.stop.agreed(self.engine.device)
            if state.step == self.steps or state.step % self.checkpointing.every == 0:
                state = self._validate(state)
                self._save(state, wait=stopping or self._done(state))
            elif stopping:
                self._save(state, wait=True)
            if stopping and not self._done(state):
                raise Interrupted(f"stopped after step {state.step}, with a checkpoint")
        return state

    def _tell_baseline(self) -> None:
        """Logs the validation loss of the first weights."""
        if self.validation is not None:
            totals = self.validated(self.validation)
            if self.log is not None:
                self.log.validation(0, totals.mean, totals.figures)

    def _done(self, state: TrainingState) -> bool:
        """Whether the last step is done, or too many validations brought nothing better."""
        if state.step >= self.steps:
            return True
        return self.patience is not None and state.worse_validations >= self.patience

    def _step(self, batch: StepBatch, step: int) -> StepResult:
        dealt = rank_places(
            consumed=0,
            global_batch=batch.size,
            micro_batch=self.micro_batch,
            data_rank=self.engine.data_rank,
            data_ranks=self.engine.data_ranks,
        )
        arranged = batch.arranged
        batches = [
            batch.batch([arranged[place] for place in own], self.engine.device) for own in dealt
        ]
        return self.engine.train_step(self._completed(batches), self._learning_rate(step))

    def _completed(self, batches: Sequence[ModelBatch]) -> Sequence[ModelBatch]:
        return batches if self.completing is None else self.completing(self.engine, batches)

    def _learning_rate(self, step: int) -> float:
        return learning_rate(step, self.steps, self.engine.settings)

    def _log_step(self, batch: StepBatch, state: TrainingState, result: StepResult) -> None:
        if self.log is not None:
            rows = Counter(batch.row_lengths)
            flops = (count * self.engine.flops_per_sample(row) for row, count in rows.items())
            self.log.step(
                state.step,
                batch.tokens,
                state.tokens,
                sum(flops),
                loss=result.loss,
                learning_rate=self._learning_rate(state.step - 1),
                gradient_norm=result.gradient_norm,
                **result.figures,
            )

    def _tell_nonfinite(
        self, batch: StepBatch, step: int, result: StepResult, in_a_row: int
    ) -> None:
        """Names the samples of a step that was skipped; stops after too many in a row."""
        shown = ", ".join(batch.samples.name(place) for place in batch.places[:SHOWN_SAMPLES])
        more = f" and {batch.size - SHOWN_SAMPLES} more" if batch.size > SHOWN_SAMPLES else ""
        cause = (
            f"step {step + 1}: loss {result.loss}, gradient norm {result.gradient_norm}: "
            f"not finite; the step was skipped; its samples are {shown}{more}"
        )
        self.say(cause)
        if in_a_row >= self.health.nonfinite_steps:
            raise StageError(f"{in_a_row} steps in a row were not finite; {cause}")

    def _save(self, state: TrainingState, wait: bool) -> None:
        if wait or not self.checkpointing.asynchronous:
            self.checkpoints.save(self.engine, state)
        else:
            self.checkpoints.begin(self.engine, state)
        if self.log is not None:
            self.log.paused()

    def _validate(self, state: TrainingState) -> TrainingState:
        if self.validation is None:
            return state
        totals = self.validated(self.validation)
        if self.log is not None:
            self.log.validation(state.step, totals.mean, totals.figures)
        loss = totals.mean
        better = state.best_loss is None or loss < state.best_loss
        if better and math.isfinite(loss):
            return replace(state, best_loss=loss, best_step=state.step, worse_validations=0)
        return replace(state, worse_validations=state.worse_validations + 1)

    def validated(self, samples: ValidationSamples) -> Totals:
        """The loss over the validation samples; collective."""
        batches = [
            samples.batch(numbers, self.engine.device)
            for numbers in own_numbers(len(samples), self.engine, self.micro_batch)
        ]
        return self.engine.evaluate(self._completed(batches))


def own_numbers(samples: int, engine: Engine, micro_batch: int) -> list[range]:
    """The samples of each of a data rank's micro-batches, where all ranks share ``samples``.

    Numbers past the last one fill the passes up, so that every rank has equally many.
    """
    per_pass = micro_batch * engine.data_ranks
    passes = -(-samples // per_pass)
    passes = -(-passes // engine.passes_multiple) * engine.passes_multiple
    own = range(engine.data_rank, passes * per_pass, engine.data_ranks)
    return [own[first : first + micro_batch] for first in range(0, len(own), micro_batch)]
