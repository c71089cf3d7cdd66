"""Errors planted into a layout's ranks: each is one that a training framework has had."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings import rotary_pos_embedding
from megatron.core.optimizer import optimizer as megatron_optimizer

from llmscale.models import cross_entropy, router, shards
from llmscale.parallel import context
from llmscale.training import batches, checkpoint, megatron_engine, objectives
from llmscale.verify import runs

finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")


def _nothing(*_: Any, **__: Any) -> None:
    pass


nothing = nullcontext
"""No error at all."""


@contextmanager
def norms_not_reduced_over_the_tensor_group() -> Iterator[None]:
    with patch.object(finalize, "_allreduce_non_tensor_model_parallel_grads", _nothing):
        yield


@contextmanager
def loss_averaged_over_ranks() -> Iterator[None]:
    def mean(losses_bs: torch.Tensor, mask_bs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = (losses_bs * mask_bs).sum() / mask_bs.sum() * mask_bs.numel()
        return total, torch.tensor(mask_bs.numel(), dtype=torch.int)

    with patch.object(batches, "masked_sum", mean):
        yield


@contextmanager
def last_layer_dropped() -> Iterator[None]:
    build = runs.MegatronEngine

    def build_short(*arguments: Any, **options: Any) -> Any:
        engine = build(*arguments, **options)
        if dist.get_rank() == dist.get_world_size() - 1:
            layers = megatron_engine.inner_model(engine.chunks[-1]).decoder.layers
            layers[-1].forward = lambda hidden_states, context=None, **_: (hidden_states, context)
        return engine

    with patch.object(runs, "MegatronEngine", build_short):
        yield


@contextmanager
def positions_of_the_first_rank_everywhere() -> Iterator[None]:
    def first(angles: torch.Tensor, dimension: int, group: Any) -> torch.Tensor:
        return angles[: angles.shape[dimension] // group.size()]

    with patch.object(rotary_pos_embedding, "get_pos_emb_on_this_cp_rank", first):
        yield


@contextmanager
def mask_lost_in_packing() -> Iterator[None]:
    apart = objectives._apart

    def without_segments(*arguments: Any) -> Any:
        return objectives.replace(apart(*arguments), segments_bs=None)

    with patch.object(objectives, "_apart", without_segments):
        yield


@contextmanager
def tied_embedding_not_synchronized() -> Iterator[None]:
    with patch.object(finalize, "_allreduce_word_embedding_grads", _nothing):
        yield


@contextmanager
def keys_of_other_ranks_get_no_gradient() -> Iterator[None]:
    def own_part(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        places = context.own_places(gradient.shape[0], ctx.group.rank(), ctx.group.size())
        return gradient[places], None

    with patch.object(context._WholeSequence, "backward", staticmethod(own_part)):
        yield


@contextmanager
def balance_loss_weighed_by_a_ranks_tokens() -> Iterator[None]:
    whole = router.BalancedRouter._balance_loss

    def half(self: Any, *arguments: Any) -> torch.Tensor:
        return whole(self, *arguments) / self.tp_cp_group.size()

    with patch.object(router.BalancedRouter, "_balance_loss", half):
        yield


@contextmanager
def experts_not_reduced() -> Iterator[None]:
    from megatron.core.distributed import DistributedDataParallel

    with patch.object(DistributedDataParallel, "finish_grad_sync", _dense_alone):
        yield


def _dense_alone(self: Any, *_: Any, **__: Any) -> None:
    for bucket_group in self.bucket_groups:
        bucket_group.finish_grad_sync()
    for bucket_group in self.expert_parallel_bucket_groups:
        bucket_group.reset()


@contextmanager
def heads_of_the_first_rank_everywhere() -> Iterator[None]:
    split = shards.QueryKeyValue.split

    def first(self: Any, whole: Any, rank: int, ranks: int) -> torch.Tensor:
        return split(self, whole, 0, ranks)

    @contextmanager
    def filling() -> Iterator[None]:
        with patch.object(shards.QueryKeyValue, "split", first):
            yield

    fill = runs.fill

    def wrong_fill(*arguments: Any) -> None:
        with filling():
            fill(*arguments)

    with patch.object(runs, "fill", wrong_fill):
        yield


@contextmanager
def vocabulary_of_other_ranks_forgotten() -> Iterator[None]:
    class Alone:
        def size(self) -> int:
            return 1

    original = cross_entropy._CrossEntropy.forward

    def forward(
        ctx: Any, logits: Any, labels: Any, first: int, true: int, group: Any
    ) -> torch.Tensor:
        return original(ctx, logits, labels, first, true, Alone())

    with patch.object(cross_entropy._CrossEntropy, "forward", staticmethod(forward)):
        yield


@contextmanager
def shared_embedding_counted_twice() -> Iterator[None]:
    with patch.object(megatron_optimizer, "param_is_not_shared", lambda parameter: True):
        yield


@contextmanager
def one_rank_at_another_learning_rate() -> Iterator[None]:
    update = megatron_engine.MegatronEngine.update

    def other(self: Any, totals: Any, rate: float) -> Any:
        return update(self, totals, rate * (1.1 if dist.get_rank() == 1 else 1.0))

    with patch.object(megatron_engine.MegatronEngine, "update", other):
        yield


@contextmanager
def moments_lost_in_the_checkpoint() -> Iterator[None]:
    save = checkpoint.Checkpoints.save

    def forget(self: Any, engine: Any, state: Any) -> None:
        for part in engine.optimizer.chained_optimizers:
            for moments in part.optimizer.state.values():
                moments["exp_avg"].zero_()
        save(self, engine, state)

    with patch.object(checkpoint.Checkpoints, "save", forget):
        yield


@contextmanager
def gate_and_up_swapped_in_the_export() -> Iterator[None]:
    join = shards.Stacked.join

    with patch.object(shards.Stacked, "join", lambda self, parts: join(self, parts)[::-1]):
        yield


@contextmanager
def one_replica_keeps_its_own_gradient() -> Iterator[None]:
    backward = megatron_engine.MegatronEngine.backward

    def other(self: Any, batches: Any) -> Any:
        result = backward(self, batches)
        if dist.get_rank() == 1:
            weight = megatron_engine.inner_model(self.chunks[0]).decoder.layers[1].mlp
            weight.linear_fc2.weight.main_grad.mul_(1.01)
        return result

    with patch.object(megatron_engine.MegatronEngine, "backward", other):
        yield


@contextmanager
def gradients_reduced_early() -> Iterator[None]:
    """No error: what is chosen on CUDA."""
    with patch.object(megatron_engine, "overlapped_gradient_reduction", lambda device: True):
        yield
