"""ZeroGPU support: on such a Space, a function holds a GPU only while it runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

ZERO_GPU = os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "true")
Function = TypeVar("Function", bound=Callable[..., Any])


def on_gpu(seconds: Callable[..., int] | int) -> Callable[[Function], Function]:
    """Decorates a (generator) function that needs the GPU; a no-op outside ZeroGPU.

    On ZeroGPU the function runs in a forked process: arguments and results are pickled, and side effects are lost.

    Args:
        seconds: maximum duration, or a function of the same arguments that returns it.
    """
    if not ZERO_GPU:
        return lambda function: function
    import spaces

    return spaces.GPU(duration=seconds)
