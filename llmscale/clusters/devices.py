"""What devices this machine has, found without importing torch."""

from pathlib import Path

from llmscale.errors import MachineError
from llmscale.packages import require_package


def cuda_present() -> bool:
    """Whether the kernel shows an NVIDIA GPU."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def require_device(device: str) -> None:
    """Checks that the device a recipe asks for is here.

    Raises:
        MachineError: if ``cuda`` is asked for and this machine shows no GPU.
    """
    if device == "cuda" and not cuda_present():
        raise MachineError(
            "cluster.device: this machine has no NVIDIA GPU; set cluster.device=cpu, "
            "or run where one is (llmscale doctor tells what is here)"
        )


def require_engine(engine: str) -> None:
    """Checks that an engine's package is here.

    Raises:
        MachineError: if it is not.
    """
    if engine == "deepspeed":
        require_package("engine deepspeed", engine, "deepspeed", "use engine megatron")


def require_quantization() -> None:
    """Checks that the package that packs weights into four bits is here.

    Raises:
        MachineError: if it is not.
    """
    require_package("adapter.method qlora", "bitsandbytes", "deepspeed", "use method lora")
