"""In the place of ``megatron.core.jit`` on a machine without CUDA: nothing is compiled.

megatron-core hands functions to ``torch.compile`` while it is imported. Ranks on the CPU need none
of them compiled, and the compiler's import alone takes two seconds of a core.
"""

from collections.abc import Callable
from typing import Any


def jit_fuser(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is."""
    return function
