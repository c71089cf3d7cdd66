"""The DeepSpeed engine: any model of transformers, its state split over the ranks by ZeRO.

ZeRO (Rajbhandari et al. 2020): stage 1 splits the optimizer's state, 2 the gradients, too, 3 the
weights, too. Shape legend: b samples, s tokens a sample, v vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.utils import safe_set_full_grad
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llmscale.models.architecture import Architecture
from llmscale.training.adapters import (
    adapter_weights,
    is_adapted,
    is_factor,
    merged_weights,
    plain_model,
    save_adapter,
    virtual_tokens,
)
from llmscale.training.batches import ModelBatch, SpanBatch, TextBatch
from llmscale.training.deepspeed_setup import deepspeed, deepspeed_settings
from llmscale.training.deepspeed_state import (
    DeepSpeedWriting,
    load_state,
    load_weights,
    prepare_moments,
)
from llmscale.training.engine import StepResult, Totals
from llmscale.training.rounded_weights import Rounded, RoundedWeights, Rounding
from llmscale.training.settings import Optimizer, Precision, Zero


class DeepSpeedEngine:
    """A model in DeepSpeed's engine, with PyTorch's AdamW.

    Args:
        model: on the engine's device, with its first weights.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        zero: Zero,
        optimizer: Optimizer,
        *,
        precision: Precision = "fp32",
        device: str = "cpu",
        frozen: bool = False,
        temperature: float = 1.0,
        rounding: Rounding | None = None,
    ) -> None:
        self._temperature = temperature
        self.architecture, self.zero, self.settings = architecture, zero, optimizer
        self.device, self.precision = torch.device(device), precision
        self._virtual = virtual_tokens(model)
        self._rounded = RoundedWeights(rounded_linears(model, rounding) if rounding else {})
        if frozen:
            # Only stages 0 and 3 do without an optimizer.
            own = zero if zero.stage == 3 else zero.model_copy(update={"stage": 0})
            settings = deepspeed_settings(own, 0.0)
            self.engine, *_ = deepspeed.initialize(
                model=model.requires_grad_(False), config=settings, dist_init_required=False
            )
            return
        trainable = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self.engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=list(trainable.values()),
            optimizer=_adam(trainable, optimizer),
            config=deepspeed_settings(zero, optimizer.gradient_clip),
            dist_init_required=False,
        )
        prepare_moments(self)

    @property
    def model(self) -> nn.Module:
        """The model itself; under ZeRO 3 its parameters are partitioned."""
        model: nn.Module = self.engine.module
        return model

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer, or under ZeRO 0 PyTorch's own."""
        return self.engine.optimizer

    @property
    def stage(self) -> int:
        """ZeRO's."""
        return self.zero.stage

    @cached_property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name; tied ones once."""
        named = self.model.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    @property
    def data_rank(self) -> int:
        return dist.get_rank()

    @property
    def data_ranks(self) -> int:
        return dist.get_world_size()

    @property
    def passes_multiple(self) -> int:
        return 1

    def flops_per_sample(self, sequence_length: int) -> float:
        vocabulary: Any = self.model.config.vocab_size  # type: ignore[union-attr]
        return self.architecture.flops_per_sample(vocabulary, sequence_length)

    def parameters(self) -> int:
        return sum(math.prod(whole_shape(one)) for one in self.model.parameters())

    def train_step(self, batches: Sequence[ModelBatch], learning_rate: float) -> StepResult:
        return self.update(self.backward(batches), learning_rate)

    def backward(self, batches: Sequence[ModelBatch]) -> Totals:
        """Gradients of the global batch, divided by its count.

        Every rank gives equally many micro-batches; one may have nothing that counts.
        """
        count = float(self._total(torch.stack([batch.count for batch in batches]).sum()))
        scale = dist.get_world_size() / max(count, 1)  # DeepSpeed takes the mean over ranks
        sums = self._no_sums(batches)
        with self._rounded.in_use():
            for number, batch in enumerate(batches):
                self.engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
                loss = batch.loss(self._outputs(batch))
                sums += loss.vector()
                self.engine.backward(loss.total * scale, scale_wrt_gas=False)
        return Totals.of(self._total(sums), batches[0].figures)

    def _outputs(self, batch: ModelBatch) -> Tensor:
        """Losses a token ``[b, s]``, or scores a token ``[b, s, k]``."""
        with torch.autocast(self.device.type, torch.bfloat16, self.precision == "bf16"):
            logits_bsv = self.engine(**self._inputs(batch)).logits.float()
        if batch.labels_bs is None:
            return logits_bsv
        logits_bsv = logits_bsv[:, -batch.labels_bs.shape[1] :]
        if self._temperature != 1:
            logits_bsv = logits_bsv / self._temperature
        losses_t = cross_entropy(
            logits_bsv.flatten(0, 1), batch.labels_bs.flatten(), reduction="none"
        )
        return losses_t.view_as(batch.labels_bs)

    def _inputs(self, batch: ModelBatch) -> dict[str, Any]:
        if isinstance(batch, SpanBatch):
            return {
                "input_ids": batch.inputs_bs,
                "decoder_input_ids": batch.decoder_inputs_bt,
                "use_cache": False,
            }
        assert isinstance(batch, TextBatch), "there is no third kind"
        if self._virtual:
            return {"input_ids": batch.tokens_bs, "use_cache": False}
        causal = self.architecture.traits.objective == "causal"
        return {
            "input_ids": batch.tokens_bs,
            "position_ids": batch.positions_bs,
            "attention_mask": _own_document(batch, causal),
            **({"use_cache": False} if causal else {}),
        }

    def update(self, totals: Totals, learning_rate: float) -> StepResult:
        """Applies the gradients that ``backward`` left, if all is finite; collective."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._step(discard=not math.isfinite(totals.loss))
        return StepResult(
            totals.mean, totals.count, norm, math.isfinite(norm), figures=totals.figures
        )

    def _step(self, discard: bool) -> float:
        """Updates the weights, or clears gradients that are to be discarded or not finite.

        Returns:
            the gradient norm before clipping; infinite if nothing was applied.
        """
        if self.stage == 0:
            return self._step_without_zero(discard)
        if discard:
            self._spoil_gradients()
        self.engine.step()
        applied = self.engine.was_step_applied()
        return float(self.engine.get_global_grad_norm()) if applied else math.inf

    def _step_without_zero(self, discard: bool) -> float:
        parameters = list(self.trainable.values())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if discard or not torch.isfinite(norm):
            self.engine.zero_grad()
            return math.inf
        if self.settings.gradient_clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.settings.gradient_clip, norm)
        self.engine.step()
        return float(norm)

    def _spoil_gradients(self) -> None:
        """Makes ZeRO skip the step and clear what it has accumulated, as on an overflow."""
        parameter = next(iter(self.trainable.values()))
        spoilt = torch.full(whole_shape(parameter), math.nan, device=parameter.device)
        safe_set_full_grad(parameter, spoilt)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[ModelBatch]) -> Totals:
        self.engine.eval()
        with self._rounded.in_use():
            parts = (batch.loss(self._outputs(batch)).vector() for batch in batches)
            sums = sum(parts, self._no_sums(batches))
        self.engine.train()
        return Totals.of(self._total(sums), batches[0].figures)

    @torch.no_grad()
    def outputs(self, batches: Sequence[ModelBatch]) -> list[Tensor]:
        self.engine.eval()
        with self._rounded.in_use():
            found = [self._outputs(batch) for batch in batches]
        self.engine.train()
        return found

    def _no_sums(self, batches: Sequence[ModelBatch]) -> Tensor:
        size = 2 + len(batches[0].figures)
        return torch.zeros(size, dtype=torch.float64, device=self.device)

    def _total(self, own: Tensor) -> Tensor:
        """The sum over all ranks, in fp64."""
        total = own.double()
        dist.all_reduce(total)
        return total

    def writing(self, folder: Path) -> DeepSpeedWriting:
        return DeepSpeedWriting(self, folder)

    def load(self, folder: Path) -> None:
        load_state(self, folder)

    def load_weights(self, folder: Path) -> None:
        load_weights(self, folder)

    @contextmanager
    def gathered(
        self, parameters: Sequence[nn.Parameter], changed_by: int | None = None
    ) -> Iterator[None]:
        """Parameters whole within; all ranks take the changes of the rank ``changed_by``."""
        whole: Any = nullcontext()
        if self.stage == 3:
            whole = deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=changed_by)
        with whole:
            yield

    def export(self, folder: Path) -> None:
        """Writes ``folder``; of a model with an adapter the two merged, and it in ``adapter/``.

        Virtual tokens are in ``adapter/`` alone.
        """
        adapted = is_adapted(self.model)
        kept = self._kept_by_first(self.whole_weights())
        if dist.get_rank() == 0:
            below: Any = self.model
            if adapted:
                below = plain_model(self.model)
            below.save_pretrained(folder, state_dict=kept)
        if adapted:
            own = self._kept_by_first(adapter_weights(self.model, self.gathered))
            if dist.get_rank() == 0:
                save_adapter(self.model, own, folder / "adapter")
        dist.barrier()

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        if is_adapted(self.model):
            yield from merged_weights(self.model, self.gathered)
            return
        for name, parameter in self.model.named_parameters():
            with self.gathered([parameter]):
                yield name, parameter.detach()

    @staticmethod
    def _kept_by_first(weights: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copies on rank 0, nothing on the others, which take part."""
        first = dist.get_rank() == 0
        return {name: whole.cpu().clone() for name, whole in weights if first}

    def close(self) -> None:
        """Removes DeepSpeed's hooks and buffers, so that the memory is freed."""
        self.engine.destroy()
        # Where ZeRO 3 leaves the model for ever.
        FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not self.model]


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """A parameter's shape, also where ZeRO 3 has partitioned it, or it is packed into bytes."""
    packed = getattr(parameter, "quant_state", None)
    shape: torch.Size = (packed or parameter).shape
    return getattr(parameter, "ds_shape", shape)


def _adam(parameters: dict[str, nn.Parameter], settings: Optimizer) -> torch.optim.AdamW:
    """Norms and biases do not decay, as in the Megatron engine, nor do an adapter's factors."""
    names = {
        name
        for name, parameter in parameters.items()
        if len(whole_shape(parameter)) > 1 and not is_factor(name)
    }
    tables = [parameter for name, parameter in parameters.items() if name in names]
    others = [parameter for name, parameter in parameters.items() if name not in names]
    groups = [
        {"params": tables, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )


def _own_document(batch: TextBatch, causal: bool) -> Tensor | None:
    """Where samples hold several documents: which tokens each sees, ``[b, 1, s, s]``."""
    if batch.segments_bs is None:
        return None
    same_bss = batch.segments_bs[:, :, None] == batch.segments_bs[:, None, :]
    return (same_bss.tril() if causal else same_bss)[:, None]


def rounded_linears(model: Any, rounding: Rounding) -> dict[nn.Parameter, Rounded]:
    """The weights of all linear layers but the head."""
    head = model.get_output_embeddings()
    linear = (one for one in model.modules() if isinstance(one, nn.Linear) and one is not head)
    return {one.get_parameter("weight"): rounding.rounded for one in linear}
