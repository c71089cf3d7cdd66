"""The state of PyTorch's AdamW inside megatron-core's optimizers.

megatron-core 0.16.1 is made for Apex's and Transformer Engine's Adam, whose step count is
one a group. PyTorch's is one a parameter, which its loading paths get wrong; three
work-arounds for that are not used where Apex or Transformer Engine is installed. A fourth is
for the padding of the distributed optimizer, and always used.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch


def prepare(optimizer: Any) -> None:
    """Makes AdamW fused, gives it zero moments, and lets checkpoints be loaded into them."""
    for part in optimizer.chained_optimizers:
        adam = part.optimizer
        if not isinstance(adam, torch.optim.AdamW):
            continue
        for group in adam.param_groups:
            group.update(fused=True, foreach=False)
            for parameter in group["params"]:
                adam.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        if hasattr(part, "_set_main_param_and_optimizer_states"):
            _keep_step_while_loading(part)


def _keep_step_while_loading(part: Any) -> None:
    """The distributed optimizer expects a ``step`` among the loaded tensors that it never saves."""
    original = part._set_main_param_and_optimizer_states

    def set_states(model_parameter: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, position = part.model_param_group_index_map[model_parameter]
        main_parameter = part.optimizer.param_groups[group]["params"][position]
        step = part.optimizer.state[main_parameter]["step"]
        original(model_parameter, {**tensors, "step": step})

    part._set_main_param_and_optimizer_states = set_states


def separate_step_counts(optimizer: Any) -> None:
    """After loading, all parameters share one step tensor, which AdamW would advance for each."""
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()


@contextmanager
def padding_counted(chunks: Iterable[Any]) -> Iterator[None]:
    """Lets the distributed optimizer find each parameter's state while it makes a checkpoint.

    megatron-core takes the padding between buckets out of the gathered state, but then looks
    parameters up at places that count it: behind a padded bucket (tied embeddings have one of
    their own) it would silently save another parameter's numbers.
    """
    with ExitStack() as stack:
        for chunk in chunks:
            for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
                stack.enter_context(patch.object(buffer, "numel_unpadded", buffer.numel))
                for bucket in buffer.buckets:
                    size = bucket.grad_data.numel()
                    stack.enter_context(patch.object(bucket, "numel_unpadded", size))
        yield
