"""ZeroGPU: on such a Space, a function gets a GPU for as long as it runs and asks for."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

ZERO_GPU = os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "true")
Function = TypeVar("Function", bound=Callable[..., Any])


def on_gpu(seconds: Callable[..., int] | int) -> Callable[[Function], Function]:
    """Decorates a function, or generator function, that needs the GPU; elsewhere it is left as it is.

    On ZeroGPU the function runs in a process forked for it: arguments and results are pickled, and nothing that it
    sets remains.

    Args:
        seconds: the most it takes, or a function of the same arguments that says so.
    """
    if not ZERO_GPU:
        return lambda function: function
    import spaces

    return spaces.GPU(duration=seconds)
