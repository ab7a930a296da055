"""Pins memory that processes share, so that copies from it run beside all else, where that makes them faster."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

_TRIED = 4 << 20  # bytes
_TIMES = 3
_SLOWER = 2.0  # times as slow as a copy of other memory, for which the caller waits: then pinning does harm


@contextlib.contextmanager
def pinned(memory: Any, devices: Sequence[torch.device]) -> Iterator[bool]:
    """Pins a `SharedMemory` for the time of the block; does nothing where it cannot, or where copies become slower.

    A GPU reads pinned memory where it lies, in small pages. What that costs depends on how the machine, which may be a
    virtual one, finds them; what is not pinned is copied through memory of the driver.
    """
    gpus = [device for device in devices if device.type == "cuda"]
    registered = False
    if memory is not None and gpus:
        address = np.frombuffer(memory.map, np.uint8).__array_interface__["data"][0]
        with contextlib.suppress(RuntimeError, AttributeError):
            registered = int(torch.cuda.cudart().cudaHostRegister(address, memory.size, 1)) == 0  # for all contexts
        if registered and not faster(memory, gpus[0]):
            torch.cuda.cudart().cudaHostUnregister(address)
            registered = False
    try:
        yield registered
    finally:
        if registered:
            for device in gpus:
                torch.cuda.synchronize(device)
            torch.cuda.cudart().cudaHostUnregister(address)


def faster(memory: Any, device: torch.device) -> bool:
    """Returns whether copies from pinned memory take no longer than copies from other memory do, by trying."""
    size = min(memory.size, _TRIED)
    here = torch.from_numpy(np.frombuffer(memory.map, np.uint8, size))
    return _seconds(here, device) <= _SLOWER * _seconds(torch.zeros(size, dtype=torch.uint8), device)


def _seconds(source: torch.Tensor, device: torch.device) -> float:
    """Returns how long a copy to a device takes at best, on a stream of its own."""
    best = float("inf")
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device, priority=-1)):
        for _ in range(_TIMES):
            start = time.perf_counter()
            source.to(device, non_blocking=True)
            torch.cuda.current_stream().synchronize()
            best = min(best, time.perf_counter() - start)
    return best
