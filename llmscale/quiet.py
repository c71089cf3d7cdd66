"""Importing this first keeps other libraries quiet, and quick, where there is no CUDA."""

import logging
import os
import sys
import threading
import warnings
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

from llmscale.parallel import uncompiled

warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|transformer_engine).*")
warnings.filterwarnings("ignore", message=".*(cuda_graph_scope|CUDA_DEVICE_MAX_CONNECTIONS).*")
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", category=DeprecationWarning)
logging.getLogger("megatron").setLevel(logging.ERROR)
logging.getLogger("torch.distributed").setLevel(logging.ERROR)

if not any(Path("/dev").glob("nvidia[0-9]*")):
    # transformers imports deepspeed where it is installed, which would look for a device aloud.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.modules.setdefault("megatron.core.jit", uncompiled)

# A lock between processes would be reported as leaked when a rank is killed.
tqdm.set_lock(threading.RLock())
