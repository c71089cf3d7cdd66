"""Importing this first keeps other libraries' notes about absent CUDA extensions quiet."""

import logging
import os
import threading
import warnings
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|transformer_engine).*")
warnings.filterwarnings("ignore", message=".*(cuda_graph_scope|CUDA_DEVICE_MAX_CONNECTIONS).*")
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", category=DeprecationWarning)
logging.getLogger("megatron").setLevel(logging.ERROR)
logging.getLogger("torch.distributed").setLevel(logging.ERROR)

# transformers imports deepspeed where it is installed, which would look for a device aloud.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# A lock between processes would be reported as leaked when a rank is killed.
tqdm.set_lock(threading.RLock())
