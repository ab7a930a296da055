"""Conditions under which methods run: gradients, precision and random numbers, restored afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

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


class FullPrecision:
    """Turns TF32 off for float32 matrix products and convolutions on NVIDIA GPUs while any thread is inside.

    PyTorch has this setting per process only: while an explanation runs, float32 convolutions of other threads, and
    their matrix products if TF32 was enabled for these, also run in full float32. Their results change within rounding
    and they take longer; bfloat16 and float16 are not affected. The last thread to leave restores the settings.
    """

    _lock: ClassVar = threading.Lock()
    _inside: ClassVar[int] = 0
    _before: ClassVar[list[tuple[Callable, Any]]] = []

    def __enter__(self) -> None:
        cls = FullPrecision
        with cls._lock:
            if not cls._inside:
                cls._before = _tf32_settings()
                torch.set_float32_matmul_precision("highest")
                torch.backends.cudnn.allow_tf32 = False
            cls._inside += 1

    def __exit__(self, *exception: object) -> None:
        cls = FullPrecision
        with cls._lock:
            cls._inside -= 1
            if not cls._inside:
                for put_back, value in cls._before:
                    put_back(value)


def _tf32_settings() -> list[tuple[Callable, Any]]:
    """Returns pairs of setter and current value for all settings that control TF32, in the order to restore them.

    The older settings also change the newer ones of torch 2.9. Using the newer ones alone is not an option: PyTorch
    then raises an error for the older.
    """
    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    settings: list[tuple[Callable, Any]] = []
    with suppress(RuntimeError):  # the caller has used the newer interface alone
        settings.append((torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
    owners: list[tuple[Any, str]] = [(cudnn, "allow_tf32")]
    if hasattr(cublas, "fp32_precision"):
        newer = cublas, torch.backends.mkldnn.matmul, cudnn.conv, cudnn.rnn  # type: ignore[attr-defined]
        owners += [(owner, "fp32_precision") for owner in newer]
    for owner, name in owners:
        with suppress(RuntimeError):
            settings.append((partial(setattr, owner, name), getattr(owner, name)))
    return settings
