"""The package deepspeed, made ready: the device told, nothing compiled, nothing printed."""

import logging
import os
import warnings

import llmscale.quiet  # noqa: F401

os.environ.setdefault("LOCAL_RANK", "0")

import deepspeed
from deepspeed.utils import logger

__all__ = ["deepspeed"]

# On the CPU it would compile a shared-memory all-reduce, for more than a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logger.setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*(all_gather|reduce_scatter)_.*deprecated.*")
