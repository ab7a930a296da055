"""Full float32 precision on NVIDIA GPUs, where PyTorch rounds to TF32 by default."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar

import torch


class FullPrecision:
    """Turns TF32 off for float32 matrix products and convolutions on NVIDIA GPUs while any thread is inside.

    PyTorch has this setting per process only. Prediction, evaluation and explanation all run inside, so their answers
    do not depend on other threads. float32 layers that a caller runs itself at the same time also run in full float32,
    and their results change within rounding. bfloat16 and float16 are not affected. The last thread to leave restores
    the settings.
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
