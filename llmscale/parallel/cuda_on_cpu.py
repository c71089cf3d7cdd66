"""CUDA answered on the CPU, so that unmodified megatron-core runs on gloo ranks.

megatron-core asks for CUDA by name in many places: ``device="cuda"``, ``Tensor.cuda()``,
``torch.cuda.current_device()``, and type names such as ``torch.cuda.FloatTensor``. Inside
``cuda_on_cpu()`` its modules see a ``torch`` that answers these on the CPU; every other
module sees the real one. Leaving the context undoes it all. With ``device: cuda`` nothing
of this is ever entered.
"""

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch

from llmscale.errors import MachineError
from llmscale.parallel.cpu_kernels import cpu_kernels

TESTED_VERSIONS = ("0.16.1",)

FACTORIES = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros")

MODULES = (
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel",
    "megatron.core.transformer.moe.moe_layer",
)

CPU = torch.device("cpu")


@contextmanager
def cuda_on_cpu(device: torch.device = CPU) -> Iterator[None]:
    """Lets megatron-core run on the CPU for as long as the context lasts.

    Args:
        device: where it is to put tensors; on the meta device it builds models of any size.

    Raises:
        MachineError: if the installed megatron-core is not a version this was tested with.
    """
    _check_version()
    for wanted in MODULES:
        importlib.import_module(wanted)
    stand_in = _torch_without_cuda(device)
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
                stack.enter_context(patch.object(module, "torch", stand_in))
        dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
        stack.enter_context(patch.object(dispatcher, "maybe_move_tensor_to_cpu", _moved_to_cpu))
        stack.enter_context(patch.object(random, "_get_cuda_rng_state", _get_random_state))
        stack.enter_context(patch.object(random, "_set_cuda_rng_state", _set_random_state))
        stack.enter_context(patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor))
        stack.enter_context(patch.object(torch.Tensor, "type", _type_as_cuda(torch.Tensor.type)))
        stack.enter_context(cpu_kernels())
        yield


def _check_version() -> None:
    import megatron.core

    if megatron.core.__version__ not in TESTED_VERSIONS:
        raise MachineError(
            f"megatron-core {megatron.core.__version__} was not tested on the CPU; "
            f"pip install megatron-core=={TESTED_VERSIONS[-1]}"
        )


def _torch_without_cuda(device: torch.device) -> types.ModuleType:
    """A module that is ``torch`` but for the names that would touch CUDA."""
    stand_in = types.ModuleType("torch")
    stand_in.__dict__.update(torch.__dict__)
    stand_in.__dict__["__getattr__"] = lambda name: getattr(torch, name)
    for name in FACTORIES:
        setattr(stand_in, name, _on_device(getattr(torch, name), device))
    stand_in.cuda = _cuda_namespace(device)  # type: ignore[attr-defined]
    stand_in.autocast = (  # type: ignore[attr-defined]
        lambda device_type, **options: torch.autocast("cpu", **options)
    )
    return stand_in


def _cuda_namespace(device: torch.device) -> types.ModuleType:
    cuda = types.ModuleType("torch.cuda")
    cuda.__dict__.update(torch.cuda.__dict__)
    answers: dict[str, Any] = {
        "current_device": lambda: device,
        "current_stream": _Stream,
        "default_stream": _Stream,
        "device_count": lambda: 1,
        "empty_cache": _nothing,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "is_available": lambda: False,
        "manual_seed": torch.manual_seed,
        "set_device": _nothing,
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "stream": lambda _stream: nullcontext(),
        "synchronize": _nothing,
        "Event": _Event,
        "Stream": _Stream,
    }
    cuda.__dict__.update(answers)
    return cuda


class _Stream:
    """A CUDA stream where everything is done when the call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _stream: "_Stream") -> None:
        pass

    def wait_event(self, _event: "_Event") -> None:
        pass

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        return event or _Event()

    def synchronize(self) -> None:
        pass


class _Event:
    """A CUDA event that has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def wait(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _on_device(factory: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    def make(*arguments: Any, **options: Any) -> Any:
        if "cuda" in str(options.get("device")):
            options["device"] = device
        options.pop("pin_memory", None)
        return factory(*arguments, **options)

    return make


def _type_as_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """``tensor.type()`` names a CUDA type, for megatron-core's comparisons of names."""

    def type_name(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        answer = original(tensor, *arguments, **options)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    return type_name


def _get_random_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_random_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _moved_to_cpu(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
    """How many tokens go where, as the host reads it; megatron-core moves CUDA tensors alone."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor
