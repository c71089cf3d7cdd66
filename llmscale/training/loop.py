"""The training loop: step, log, validate, save, stop."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from megatron.core import parallel_state

from llmscale.data.samples import Samples, rank_places
from llmscale.errors import Interrupted, StageError
from llmscale.training.batches import ModelBatch
from llmscale.training.checkpoint import Checkpoints, TrainingState
from llmscale.training.log import TrainingLog
from llmscale.training.megatron_engine import MegatronEngine, StepResult
from llmscale.training.objectives import Objective
from llmscale.training.schedule import learning_rate
from llmscale.training.settings import Batch, Checkpointing, Health
from llmscale.training.signals import StopRequest

SHOWN_SAMPLES = 8


@dataclass
class Trainer:
    """One rank's part of training a model."""

    engine: MegatronEngine
    objective: Objective
    samples: Samples
    validation: Samples | None
    validation_samples: int
    steps: int
    batch: Batch
    checkpointing: Checkpointing
    health: Health
    checkpoints: Checkpoints
    stop: StopRequest
    log: TrainingLog | None
    say: Callable[[str], None] = print

    def train(self, state: TrainingState) -> TrainingState:
        """Trains from where ``state`` stands to the last step; collective.

        Raises:
            Interrupted: after a checkpoint, if any rank was asked to stop.
            StageError: if too many steps in a row were not finite.
        """
        nonfinite = 0
        while state.step < self.steps:
            result = self._step(state)
            healthy = result.applied or result.overflowed
            nonfinite = 0 if healthy else nonfinite + 1
            if not healthy:
                self._tell_nonfinite(state, result, nonfinite)
            state = replace(
                state,
                step=state.step + 1,
                consumed_samples=state.consumed_samples + self.batch.global_,
                tokens=state.tokens + self._tokens_read,
            )
            self._log_step(state, result)
            self.checkpoints.poll()
            stopping = self.stop.agreed(self.engine.device)
            if state.step == self.steps or state.step % self.checkpointing.every == 0:
                state = self._validate(state)
                self._save(state, wait=stopping or state.step == self.steps)
            elif stopping:
                self._save(state, wait=True)
            if stopping and state.step < self.steps:
                raise Interrupted(f"stopped after step {state.step}, with a checkpoint")
        return state

    def _step(self, state: TrainingState) -> StepResult:
        places = rank_places(
            consumed=state.consumed_samples,
            global_batch=self.batch.global_,
            micro_batch=self.batch.micro,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_ranks=parallel_state.get_data_parallel_world_size(),
        )
        batches = [
            self.objective.batch(self.samples.shuffled(own), own, self.engine.device)
            for own in places
        ]
        return self.engine.train_step(batches, self._learning_rate(state.step))

    @property
    def _tokens_read(self) -> int:
        """Tokens of text in a global batch, whether they are predicted or not."""
        return self.batch.global_ * self.samples.sequence_length

    def _learning_rate(self, step: int) -> float:
        return learning_rate(step, self.steps, self.engine.settings)

    def _log_step(self, state: TrainingState, result: StepResult) -> None:
        if self.log is not None:
            self.log.step(
                state.step,
                self._tokens_read,
                state.tokens,
                loss=result.loss,
                learning_rate=self._learning_rate(state.step - 1),
                gradient_norm=result.gradient_norm,
            )

    def _tell_nonfinite(self, state: TrainingState, result: StepResult, in_a_row: int) -> None:
        """Names the samples of a step that was skipped; stops after too many in a row."""
        first = state.consumed_samples
        numbers = [self.samples.number_at(first + place) for place in range(self.batch.global_)]
        shown = ", ".join(map(str, numbers[:SHOWN_SAMPLES]))
        more = f" and {len(numbers) - SHOWN_SAMPLES} more" if len(numbers) > SHOWN_SAMPLES else ""
        cause = (
            f"step {state.step + 1}: loss {result.loss}, gradient norm {result.gradient_norm}: "
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
        loss = self.validation_loss(self.validation)
        if self.log is not None:
            self.log.validation(state.step, loss)
        better = state.best_loss is None or loss < state.best_loss
        if better and math.isfinite(loss):
            return replace(state, best_loss=loss, best_step=state.step)
        return state

    def validation_loss(self, samples: Samples) -> float:
        """The mean loss a token over the first validation samples; collective."""
        data_ranks = parallel_state.get_data_parallel_world_size()
        data_rank = parallel_state.get_data_parallel_rank()
        count = min(len(samples), self.validation_samples)
        per_pass = self.batch.micro * data_ranks
        passes = -(-count // per_pass)
        if self.engine.layout.virtual_pipeline > 1:
            passes = -(-passes // self.engine.layout.pipeline) * self.engine.layout.pipeline
        own = range(data_rank, passes * per_pass, data_ranks)
        batches = [
            self._validation_batch(samples, own[i : i + self.batch.micro], count)
            for i in range(0, len(own), self.batch.micro)
        ]
        total, tokens = self.engine.evaluate(batches)
        return total / tokens

    def _validation_batch(self, samples: Samples, numbers: range, count: int) -> ModelBatch:
        """Numbers past the last sample only fill the micro-batch up; their tokens do not count."""
        present = [min(number, count - 1) for number in numbers]
        windows = np.stack([samples.window(number) for number in present])
        batch = self.objective.batch(windows, present, self.engine.device)
        counts = torch.tensor([number < count for number in numbers], device=self.engine.device)
        return batch.counting(counts)
