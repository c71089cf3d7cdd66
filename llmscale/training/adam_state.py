"""The state of PyTorch's AdamW inside megatron-core's optimizers.

megatron-core 0.16.1 is made for Apex's and Transformer Engine's Adam, whose step count is
one a group. PyTorch's is one a parameter, which its loading paths get wrong; the three
work-arounds live here. Nothing here is used where Apex or Transformer Engine is installed.
"""

from typing import Any

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
