"""Captures CUDA graphs safely next to other threads, graphs and GPUs of the process."""

import ctypes
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from . import nvrtc

T = TypeVar("T")
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no implicit synchronisation with the default stream of other threads

_capturing = threading.Lock()
_idle: dict[int, list[torch.cuda.Stream]] = {}  # per device, streams created here on which no live graph was captured
_beside: dict[int, torch.cuda.Stream] = {}  # a second stream for each of these, by handle


def warm_up(device: torch.device, run: Callable[[], object], times: int = 3) -> None:
    """Calls `run` eagerly on a side stream, so that algorithms are chosen and kernels compiled before a capture."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(times):
                run()
        torch.cuda.current_stream().wait_stream(stream)


def record(graph: torch.cuda.CUDAGraph, device: torch.device, run: Callable[[], T]) -> T:
    """Captures what `run` does on `device` into `graph` and returns its result. One capture runs at a time.

    Each graph gets a stream on which no other live graph was captured. PyTorch allocates one cuBLAS workspace per
    stream, and a captured product keeps its address: graphs captured on one stream (the default) would overwrite each
    other's workspace when replayed concurrently. Other threads may use the GPU meanwhile.

    Raises:
        RuntimeError: an operation in `run` cannot be captured.
    """
    with _capturing, torch.cuda.device(device):
        index = torch.cuda.current_device()
        streams = _idle.setdefault(index, [])
        stream = streams.pop() if streams else _new_stream(index)
        weakref.finalize(graph, streams.append, stream)
        # PyTorch's default capture stream belongs to the device that captured first.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            return run()


@torch.inference_mode()
def replayed(
    run: Callable[[Tensor], Tensor], images: Tensor, weights: Callable[[], list[object]], changes: Callable[[], int]
) -> Callable[[Tensor], Tensor]:
    """Captures a network and returns it as a function of images, without Python's launch overhead.

    Each call returns a new tensor. The function is thread-safe on one or several CUDA streams, but calls are serialised
    because a graph has one input buffer.

    Args:
        run: the network.
        images: (B, C, H, W) on the GPU of the network; the function takes batches of exactly this shape.
        weights: returns what the graph reads, which must outlive the network and replacements in it.
        changes: returns another number when the graph must no longer be used.

    Raises:
        ValueError: the images are not on an NVIDIA GPU, or there are none; from the function, another shape.
        RuntimeError: from the function, if the network has changed since.
    """
    if not images.is_cuda:
        raise ValueError("CUDA graphs need a model on an NVIDIA GPU: call model.cuda() first")
    if not len(images):
        raise ValueError(f"a graph needs at least one image, got {tuple(images.shape)}")
    images = images.clone()
    device, graph = images.device, torch.cuda.CUDAGraph()
    warm_up(device, lambda: run(images))
    captured = changes()
    kept = weights()
    answers = record(graph, device, lambda: run(images))
    lock, finished, last = threading.Lock(), torch.cuda.Event(), torch.cuda.current_stream(device)
    with torch.cuda.device(device):
        finished.record()

    @torch.inference_mode()
    def replay(batch: Tensor) -> Tensor:
        nonlocal last
        if batch.shape != images.shape:
            raise ValueError(f"this graph takes {tuple(images.shape)}, got {tuple(batch.shape)}")
        if changes() != captured:
            raise RuntimeError("the model has changed since this graph was made: call model.graphed(...) again")
        with lock, torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            if stream != last:  # the previous call may still read or write the buffers
                stream.wait_event(finished)
            images.copy_(batch)
            graph.replay()
            answer = answers.clone()
            finished.record(stream)
            last = stream
        return answer

    replay.weights = kept  # type: ignore[attr-defined]
    return replay


def run_beside(x: Tensor, run: Callable[[], T]) -> Callable[[], T]:
    """Runs something that reads x; where `record` is capturing a CUDA graph, beside what follows on the current stream.

    Launched one by one, kernels of two streams cost more time of the CPU than they save on the GPU.

    Returns:
        A function that returns the result, for which what follows on the current stream waits. Until then, nothing
        that is read may be freed.
    """
    main = torch.cuda.current_stream() if x.is_cuda and torch.cuda.is_current_stream_capturing() else None
    stream = _beside.get(main.cuda_stream) if main else None
    if main is None or stream is None:
        result = run()
        return lambda: result
    stream.wait_stream(main)
    with torch.cuda.stream(stream):
        result = run()

    def wait() -> T:
        main.wait_stream(stream)
        return result

    return wait


def _new_stream(device: int) -> torch.cuda.Stream:
    stream = _create_stream(device)
    if torch.version.hip is None:
        _beside[stream.cuda_stream] = _create_stream(device)
    return stream


def _create_stream(device: int) -> torch.cuda.Stream:
    """Creates a stream by the driver. PyTorch hands out streams of a small pool in turn, so two may be the same."""
    if torch.version.hip is not None:
        return torch.cuda.Stream(device)
    torch.cuda.current_stream(
        device
    ).synchronize()  # creates the context of the device and makes it current in this thread
    handle = ctypes.c_void_p()
    nvrtc.use_context(device)
    nvrtc.call_driver("cuStreamCreate", ctypes.byref(handle), NON_BLOCKING)
    assert handle.value is not None
    return torch.cuda.ExternalStream(handle.value, torch.device("cuda", device))
