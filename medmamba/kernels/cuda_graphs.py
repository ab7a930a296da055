"""CUDA graphs that other threads, other graphs and other GPUs of the process do not disturb."""

import ctypes
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch

from .cuda import nvrtc

T = TypeVar("T")
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the default stream, which other threads may be using

_capturing = threading.Lock()
_idle: dict[int, list[torch.cuda.Stream]] = {}  # streams of this module that no living graph was captured on


def warm_up(device: torch.device, run: Callable[[], object], times: int = 3) -> None:
    """Calls `run` eagerly on a stream of its own, so that libraries choose algorithms and kernels are compiled before a
    capture, in which they cannot."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(times):
                run()
        torch.cuda.current_stream().wait_stream(stream)


def record(graph: torch.cuda.CUDAGraph, device: torch.device, run: Callable[[], T]) -> T:
    """Captures what `run` does on `device`, one capture of the process at a time, and returns what it returns.

    Each graph is captured on a stream that no other living graph was captured on. PyTorch gives the workspace of matrix
    products to a stream, and a captured product keeps its address: two graphs of one stream, as all graphs captured
    without naming one are, would write to the same workspace when they run at the same time. Other threads may go on
    using the GPU meanwhile.

    Raises:
        RuntimeError: something in `run` cannot be captured.
    """
    with _capturing, torch.cuda.device(device):
        index = torch.cuda.current_device()
        streams = _idle.setdefault(index, [])
        stream = streams.pop() if streams else _new_stream(index)
        weakref.finalize(graph, streams.append, stream)
        # By default a capture belongs to a stream of PyTorch's on the device that was the first to capture.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            return run()


def _new_stream(device: int) -> torch.cuda.Stream:
    """PyTorch's own streams come from a small pool, in turn, so that two of them may be the same."""
    if torch.version.hip is not None:
        return torch.cuda.Stream(device)
    torch.cuda.current_stream(device).synchronize()  # so that the device has its context, and this thread too
    handle = ctypes.c_void_p()
    nvrtc.use_context(device)
    nvrtc.call_driver("cuStreamCreate", ctypes.byref(handle), NON_BLOCKING)
    assert handle.value is not None
    return torch.cuda.ExternalStream(handle.value, torch.device("cuda", device))
