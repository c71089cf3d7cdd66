"""What this machine has and lacks, and the command that would mend each lack.

Nothing here touches the network, and of the packages only torch is imported.
"""

import importlib
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Literal

import psutil

from llmscale.clusters.devices import cuda_present

State = Literal["ok", "missing", "note"]

OLDEST_PYTHON = (3, 11)
GIB = 2**30
LEAST_FREE_DISK_GIB = 10
SLURM_COMMANDS = ("sbatch", "srun", "scontrol")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        name: what was looked for.
        state: ``missing`` is to be mended; a ``note`` is worth knowing and may stay.
        detail: what was found, in one line.
        mend: the command that would mend it; empty where there is none.
    """

    name: str
    state: State
    detail: str
    mend: str = ""


@dataclass(frozen=True)
class OptionalPackage:
    """A package that only some recipes need.

    Attributes:
        name: what people call it, and the name of its distribution.
        module: the module that tells it from others of its name.
        purpose: what it is for.
        mend: the command that installs it.
        speeds_gpu: whether every recipe on a GPU gains by it.
    """

    name: str
    module: str
    purpose: str
    mend: str
    speeds_gpu: bool = False


GPU_EXTRA = "pip install --no-build-isolation 'llmscale[gpu]'"
OPTIONAL = (
    OptionalPackage("flash-attn", "flash_attn", "faster attention on GPUs", GPU_EXTRA, True),
    OptionalPackage(
        "transformer-engine", "transformer_engine", "fused layers and FP8 on GPUs", GPU_EXTRA, True
    ),
    OptionalPackage(
        "apex",
        "apex.optimizers",
        "NVIDIA's fused optimizers on GPUs",
        "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation "
        "git+https://github.com/NVIDIA/apex",
    ),
    OptionalPackage("deepspeed", "deepspeed", "the DeepSpeed engine", "pip install deepspeed"),
    OptionalPackage("vllm", "vllm", "a policy's answers by vLLM", "pip install 'llmscale[vllm]'"),
    OptionalPackage("ray", "ray", "running on Ray, and PPO", "pip install 'ray[default]'"),
    OptionalPackage(
        "submitit", "submitit", "submitting to SLURM from Python", "pip install submitit"
    ),
    OptionalPackage(
        "bitsandbytes", "bitsandbytes", "8-bit and 4-bit weights", "pip install bitsandbytes"
    ),
)


def examine() -> list[Finding]:
    """Looks at this machine, at this Python's packages and at the commands on the PATH."""
    torch, torch_finding = _torch()
    return [
        _python(),
        _cores(),
        _memory(),
        _disk(Path.cwd()),
        torch_finding,
        _gpus(torch),
        _megatron(torch),
        _transformers(),
        *(_optional(package, cuda_present()) for package in OPTIONAL),
        *_slurm(),
    ]


def _python() -> Finding:
    oldest = ".".join(map(str, OLDEST_PYTHON))
    if sys.version_info < OLDEST_PYTHON:
        return Finding(
            "python",
            "missing",
            f"{platform.python_version()}, older than {oldest}",
            f"uv venv --python {oldest}",
        )
    return Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")


def _cores() -> Finding:
    all_cores = os.cpu_count()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else all_cores
    limit = f" of {all_cores}" if usable != all_cores else ""
    return Finding("cores", "ok", f"{usable}{limit} for this process")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    return Finding(
        "memory", "ok", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    )


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / GIB
    detail = f"{free:.1f} GiB free in {folder}"
    if free < LEAST_FREE_DISK_GIB:
        return Finding("disk", "note", f"{detail}; checkpoints of larger models will not fit")
    return Finding("disk", "ok", detail)


def _torch() -> tuple[ModuleType | None, Finding]:
    install = "pip install torch"
    if not _found("torch"):
        return None, Finding("torch", "missing", "not installed", install)
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        detail = f"installed, but importing it fails: {str(error).splitlines()[0]}"
        return None, Finding("torch", "missing", detail, f"{install} --force-reinstall")
    if torch.version.cuda:
        detail = f"{torch.__version__}, built for CUDA {torch.version.cuda}"
        return torch, Finding("torch", "ok", detail)
    if cuda_present():
        detail = f"{torch.__version__}, built for the CPU, on a machine with an NVIDIA GPU"
        return torch, Finding("torch", "missing", detail, f"{install} --force-reinstall")
    return torch, Finding("torch", "ok", f"{torch.__version__}, built for the CPU")


def _gpus(torch: ModuleType | None) -> Finding:
    if torch is not None and torch.cuda.is_available():
        names = Counter(
            torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())
        )
        return Finding(
            "gpus", "ok", ", ".join(f"{count} x {name}" for name, count in names.items())
        )
    if cuda_present():
        return Finding("gpus", "missing", "there is an NVIDIA GPU that torch cannot use")
    return Finding("gpus", "note", "none; recipes run with cluster.device=cpu")


def _megatron(torch: ModuleType | None) -> Finding:
    name = "megatron-core"
    if torch is None:
        return Finding(name, "missing", "cannot be examined without torch", "pip install torch")
    from llmscale.parallel.cuda_on_cpu import TESTED_VERSIONS

    mend = f"pip install megatron-core=={TESTED_VERSIONS[-1]}"
    if not _found("megatron.core"):
        return Finding(name, "missing", "not installed", mend)
    installed = _version(name)
    if installed not in TESTED_VERSIONS:
        detail = f"{installed}; tested with {', '.join(TESTED_VERSIONS)}"
        return Finding(name, "missing", detail, mend)
    return Finding(name, "ok", f"{installed}, as tested")


def _transformers() -> Finding:
    if not _found("transformers"):
        return Finding("transformers", "missing", "not installed", "pip install transformers")
    return Finding("transformers", "ok", _version("transformers"))


def _optional(package: OptionalPackage, gpu_here: bool) -> Finding:
    if _found(package.module):
        return Finding(package.name, "ok", f"{_version(package.name)}, for {package.purpose}")
    state: State = "missing" if gpu_here and package.speeds_gpu else "note"
    top = package.module.partition(".")[0]
    if _found(top):
        detail = f"the installed package {top} is another project; for {package.purpose}"
        return Finding(
            package.name, state, detail, f"pip uninstall --yes {package.name} && {package.mend}"
        )
    return Finding(package.name, state, f"not installed; for {package.purpose}", package.mend)


def _slurm() -> Iterator[Finding]:
    """A machine without any of the commands is no SLURM machine, which is no fault."""
    paths = {command: shutil.which(command) for command in SLURM_COMMANDS}
    for command, path in paths.items():
        if path:
            yield Finding(command, "ok", path)
        else:
            yield Finding(
                command,
                "missing" if any(paths.values()) else "note",
                "not on PATH; for running on SLURM, from a login node of the cluster",
                "apt-get install slurm-client",
            )


def _found(module: str) -> bool:
    """Whether a module is installed; not even its parents are imported.

    A folder that merely has the module's name, in the current folder say, does not count.
    """
    top, *inner = module.split(".")
    spec: ModuleSpec | None = find_spec(top)
    for name in inner:
        if spec is None or spec.submodule_search_locations is None:
            return False
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec is not None and spec.origin is not None


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"
