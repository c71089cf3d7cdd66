"""The Megatron engine: owns a model, its optimizer and its parallelism."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed import finalize_model_grads as finalize_gradients
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from llmscale.models.architecture import Architecture
from llmscale.models.huggingface import export, tensors_everywhere, whole_tensors
from llmscale.models.low_rank import LINEARS
from llmscale.models.megatron import DTYPES, build_chunks, inner_model
from llmscale.parallel.context import whole_sequence
from llmscale.parallel.layout import Layout
from llmscale.parallel.probes import overlapped_gradient_reduction
from llmscale.training import adam_state
from llmscale.training.batches import ModelBatch
from llmscale.training.engine import StepResult, Totals
from llmscale.training.megatron_adapter import (
    adapter_parameters,
    add_adapter,
    export_adapter,
    weight_changes,
)
from llmscale.training.megatron_state import MegatronWriting, load_state, load_weights
from llmscale.training.rounded_weights import Rounded, RoundedWeights, Rounding
from llmscale.training.settings import Adapter, Optimizer, Precision, Recompute

INITIAL_LOSS_SCALE, LOWEST_LOSS_SCALE = 2.0**16, 1.0


class MegatronEngine:
    """Model chunks in data-parallel wrappers, with megatron-core's schedules and optimizer."""

    def __init__(
        self,
        architecture: Architecture,
        vocabulary: int,
        layout: Layout,
        optimizer: Optimizer,
        *,
        precision: Precision = "fp32",
        recompute: Recompute = "none",
        device: str = "cpu",
        frozen: bool = False,
        adapter: Adapter | None = None,
        temperature: float = 1.0,
        rounding: Rounding | None = None,
    ) -> None:
        self.architecture = architecture
        self.vocabulary = vocabulary
        self.layout = layout
        self.settings = optimizer
        self.device = torch.device(device)
        self.precision = precision
        self.adapter = adapter
        adapted = adapter is not None
        inner = build_chunks(
            architecture, vocabulary, layout, precision, recompute, device, adapted
        )
        if adapter is not None:
            add_adapter(inner, architecture, vocabulary, adapter)
        for chunk in inner:
            inner_model(chunk).temperature = temperature
        self.config = inner_model(inner[0]).config
        if frozen:
            for chunk in inner:
                chunk.requires_grad_(False)
        overlapped = overlapped_gradient_reduction(device)
        data_parallel = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlapped,
            use_distributed_optimizer=optimizer.distributed,
        )
        self.chunks = [
            DistributedDataParallel(self.config, data_parallel, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(inner)
        ]
        if overlapped:
            waiting = [chunk.no_sync for chunk in self.chunks]
            self.config.no_sync_func = waiting if len(waiting) > 1 else waiting[0]
        self._optimizer: Any = None
        self._rounded = RoundedWeights(rounded_linears(inner, rounding) if rounding else {})

    @property
    def optimizer(self) -> Any:
        """megatron-core's optimizer; made on first use, from the weights as they are then."""
        if self._optimizer is None:
            # Views made with a graph would keep the model alive for ever, and its groups.
            with torch.no_grad():
                self._optimizer = get_megatron_optimizer(
                    _optimizer_config(self.settings, self.precision),
                    self.chunks,
                    use_gloo_process_groups=False,
                )
            for group in self._optimizer.param_groups:
                group["weight_decay"] *= group["wd_mult"]  # 0 for norms and biases
            self.config.grad_scale_func = self._optimizer.scale_loss
            self.config.finalize_model_grads_func = finalize_gradients
            adam_state.prepare(self._optimizer)
        return self._optimizer

    @property
    def data_rank(self) -> int:
        return int(parallel_state.get_data_parallel_rank())

    @property
    def data_ranks(self) -> int:
        return int(parallel_state.get_data_parallel_world_size())

    @property
    def passes_multiple(self) -> int:
        return self.layout.pipeline if self.layout.virtual_pipeline > 1 else 1

    def flops_per_sample(self, sequence_length: int) -> float:
        return self.architecture.flops_per_sample(self.vocabulary, sequence_length)

    def parameters(self) -> int:
        own = 0
        if self.adapter is not None:
            own = adapter_parameters(self.architecture, self.vocabulary, self.adapter)
        return self.architecture.parameters(self.vocabulary) + own

    def writing(self, folder: Path) -> MegatronWriting:
        return MegatronWriting(self, folder)

    def load(self, folder: Path) -> None:
        load_state(self, folder)

    def load_weights(self, folder: Path) -> None:
        load_weights(self, folder)

    def export(self, folder: Path) -> None:
        """Writes ``folder``; of a model with an adapter the two merged, and it in ``adapter/``."""
        changes = weight_changes(self.chunks)
        export(self.chunks, self.architecture, self.vocabulary, folder, changes)
        if self.adapter is not None:
            export_adapter(self.chunks, self.adapter, folder / "adapter")

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        changes = weight_changes(self.chunks)
        own = whole_tensors(self.chunks, self.architecture, self.vocabulary, changes)
        return tensors_everywhere(own)

    def train_step(self, batches: Sequence[ModelBatch], learning_rate: float) -> StepResult:
        """Forward, backward and, if loss and gradients are finite, the update; collective.

        Args:
            batches: this data rank's micro-batches of the global batch.
        """
        return self.update(self.backward(batches), learning_rate)

    def backward(self, batches: Sequence[ModelBatch]) -> Totals:
        """Gradients of the global batch, divided by its count."""
        optimizer = self.optimizer
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        with self._rounded.in_use():
            return self._run(batches, forward_only=False)

    def update(self, totals: Totals, learning_rate: float) -> StepResult:
        """Applies the gradients that ``backward`` left, if all is finite; collective."""
        optimizer = self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        scale = float(optimizer.get_loss_scale())
        overflow = optimizer.prepare_grads()
        norm = math.inf if overflow else float(optimizer.get_grad_norm())
        finite = math.isfinite(totals.loss) and math.isfinite(norm)
        if finite:
            self._clip(norm)
            optimizer.step_with_ready_grads()
        overflowed = overflow and math.isfinite(totals.loss) and scale > LOWEST_LOSS_SCALE
        return StepResult(totals.mean, totals.count, norm, finite, overflowed, totals.figures)

    def _clip(self, norm: float) -> None:
        for optimizer in self.optimizer.chained_optimizers:
            if self.settings.gradient_clip > 0 and optimizer.get_parameters():
                clip_grad_by_total_norm_fp32(
                    optimizer.get_parameters(), self.settings.gradient_clip, norm
                )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[ModelBatch]) -> Totals:
        with self._evaluating():
            return self._run(batches, forward_only=True)

    @torch.no_grad()
    def outputs(self, batches: Sequence[ModelBatch]) -> list[Tensor]:
        with self._evaluating():
            return self._collected(_outputs_step, batches)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        for chunk in self.chunks:
            chunk.eval()
        with self._rounded.in_use():
            yield
        for chunk in self.chunks:
            chunk.train()

    def _collected(self, step: Any, batches: Sequence[ModelBatch]) -> list[Tensor]:
        """What the last stage has of each micro-batch."""
        found: list[Tensor] = self._pass(
            step, batches, forward_only=True, collect_non_loss_data=True
        )
        return found

    def _run(self, batches: Sequence[ModelBatch], forward_only: bool) -> Totals:
        parts = self._pass(_forward_step, batches, forward_only=forward_only)
        return self._total(parts, batches[0].figures)

    def _pass(self, step: Any, batches: Sequence[ModelBatch], **options: Any) -> Any:
        """The micro-batches through all stages, by the layout's schedule."""
        rank = parallel_state.get_context_parallel_rank()
        own = [batch.part(rank, self.layout.context) for batch in batches]
        iterators = [iter(own) for _ in self.chunks]
        several = len(self.chunks) > 1
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if several else iterators[0],
            model=self.chunks if several else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=batches[0].length,
            micro_batch_size=batches[0].samples,
            **options,
        )

    def _total(self, parts: Iterable[Tensor], figures: Sequence[str]) -> Totals:
        """Sums over micro-batches and data ranks; known to all ranks.

        Only the last pipeline stage has parts, and its tensor ranks have equal ones.
        """
        own = sum(parts, torch.zeros(2 + len(figures), dtype=torch.float64, device=self.device))
        if parallel_state.get_tensor_model_parallel_rank() != 0:
            own = torch.zeros_like(own)
        dist.all_reduce(own)
        return Totals.of(own, figures)

    @torch.no_grad()
    def logits(self, batch: ModelBatch) -> Tensor | None:
        """Logits ``[b, s, v]`` over the true vocabulary, of T5 its decoder's; collective.

        Returns:
            None on ranks that are not of the last pipeline stage.
        """
        # The interleaved schedule needs as many micro-batches as there are stages.
        with self._evaluating():
            found = self._collected(_logits_step, [batch] * self.passes_multiple)
        if not found:
            return None
        whole = gather_from_tensor_model_parallel_region(found[0])[..., : self.vocabulary]
        group = parallel_state.get_context_parallel_group()
        return whole_sequence(whole.transpose(0, 1), group).transpose(0, 1)


def rounded_linears(
    chunks: Iterable[torch.nn.Module], rounding: Rounding
) -> dict[torch.nn.Parameter, Rounded]:
    """The weights of all linear layers of the blocks; those split by columns are rounded whole."""

    def whole(weight_oi: Tensor) -> Tensor:
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        rounded_oi = rounding.rounded(gather_from_tensor_model_parallel_region(weight_oi))
        return rounded_oi.chunk(ranks, 1)[parallel_state.get_tensor_model_parallel_rank()]

    weights = [
        layer.get_submodule(name).weight
        for chunk in chunks
        for layer in inner_model(chunk).decoder.layers
        for name in LINEARS
    ]
    return {w: whole if w.partition_dim == 1 else rounding.rounded for w in weights}


def _logits_step(iterator: Iterator[ModelBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    batch = next(iterator)
    output = model(**batch.model_inputs())
    return output, lambda logits, non_loss_data: logits


def _outputs_step(iterator: Iterator[ModelBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    batch = next(iterator)
    output = model(**batch.model_inputs(), labels=batch.labels_bs)
    return output, lambda outputs, non_loss_data: outputs


def _forward_step(iterator: Iterator[ModelBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    batch = next(iterator)
    output = model(**batch.model_inputs(), labels=batch.labels_bs)
    return output, partial(_loss, batch)


def _loss(batch: ModelBatch, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = batch.loss(outputs)
    return loss.total, loss.count, loss.vector()


def _optimizer_config(settings: Optimizer, precision: Precision) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=settings.learning_rate,
        min_lr=settings.minimum_learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        clip_grad=settings.gradient_clip,
        bf16=DTYPES[precision] == torch.bfloat16,
        fp16=precision == "fp16",
        params_dtype=DTYPES[precision],
        initial_loss_scale=INITIAL_LOSS_SCALE,
        min_loss_scale=LOWEST_LOSS_SCALE,
        use_distributed_optimizer=settings.distributed,
    )
