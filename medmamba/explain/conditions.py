"""Conditions under which methods run: gradients, precision and random numbers, restored afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import ClassVar

import numpy as np
import torch

from ..utils.precision import FullPrecision
from .randomness import PrivateRandom


@contextmanager
def controlled(device: torch.device, seed: int) -> Iterator[None]:
    """Enables gradients, disables autocast and TF32, and seeds PyTorch's random numbers, for the block.

    All of it is local to this thread but TF32, which is a setting of the process: see `FullPrecision`.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(FullPrecision())
        stack.enter_context(PrivateRandom(seed))
        yield


class SeededNumPy:
    """Seeds NumPy's global generator for user-defined functions that draw from it, and restores it afterwards.

    The generator belongs to the process, so only one thread is inside at a time.
    """

    _lock: ClassVar = threading.RLock()

    def __init__(self, seed: int):
        self.seed = seed

    def __enter__(self) -> None:
        SeededNumPy._lock.acquire()
        self.before = np.random.get_state()  # noqa: NPY002
        np.random.seed(self.seed % 2**32)  # noqa: NPY002

    def __exit__(self, *exception: object) -> None:
        np.random.set_state(self.before)  # noqa: NPY002
        SeededNumPy._lock.release()
