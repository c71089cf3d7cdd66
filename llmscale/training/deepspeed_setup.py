"""The package deepspeed, made ready: the device told, nothing compiled, nothing printed."""

import logging
import warnings
from typing import Any

import llmscale.quiet  # noqa: F401

# isort: split
import deepspeed
import torch
from deepspeed.utils import logger

from llmscale.training.settings import Zero

__all__ = ["deepspeed", "deepspeed_settings"]

# On the CPU it would compile a shared-memory all-reduce, for more than a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logger.setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*(all_gather|reduce_scatter)_.*deprecated.*")

BUCKET_ELEMENTS = 2**24


def deepspeed_settings(zero: Zero, gradient_clip: float) -> dict[str, Any]:
    """What DeepSpeed is told; batch sizes and schedules are not its business."""
    to_host = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": gradient_clip if zero.stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "zero_optimization": {
            "stage": zero.stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "overlap_comm": torch.cuda.is_available(),
            **({} if zero.offload == "none" else {"offload_optimizer": to_host}),
            **({"offload_param": to_host} if zero.offload == "weights" else {}),
        },
    }
