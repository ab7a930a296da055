"""Pins memory that processes share, so that copies from it run beside all else, where that makes them faster."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

_PIECE = 1 << 20  # bytes
_PIECES = 16  # spread over the memory: what was copied just now is copied again faster
_TIMES = 2
_SLOWER = 2.0  # times as slow as a copy of other memory, for which the caller waits: then pinning does harm


@contextlib.contextmanager
def pinned(memory: Any, devices: Sequence[torch.device]) -> Iterator[bool]:
    """Pins a `SharedMemory` for the time of the block; not where it cannot, or where copies become much slower.

    A GPU reads pinned memory where it lies, in small pages. What that costs depends on how the machine, which may be a
    virtual one, finds them; what is not pinned is copied through memory of the driver.
    """
    gpus = [device for device in devices if device.type == "cuda"]
    registered = False
    if memory is not None and gpus:
        address = np.frombuffer(memory.map, np.uint8).__array_interface__["data"][0]
        with contextlib.suppress(RuntimeError, AttributeError):
            registered = int(torch.cuda.cudart().cudaHostRegister(address, memory.size, 1)) == 0  # for all contexts
    try:
        if registered and not worth_it(memory, gpus[0]):
            torch.cuda.cudart().cudaHostUnregister(address)
            registered = False
        yield registered
    finally:
        if registered:
            for device in gpus:
                torch.cuda.synchronize(device)
            torch.cuda.cudart().cudaHostUnregister(address)


def worth_it(memory: Any, device: torch.device) -> bool:
    """Returns whether copies from pinned memory take at most `_SLOWER` times as long as others do."""
    here = torch.from_numpy(np.frombuffer(memory.map, np.uint8))
    other = torch.ones(min(memory.size, _TIMES * _PIECES * _PIECE), dtype=torch.uint8)
    return copy_rate(here, device) * _SLOWER >= copy_rate(other, device)


def copy_rate(source: torch.Tensor, device: torch.device) -> float:
    """Returns how many bytes (of a uint8 tensor) per second are copied to a device at best, each byte once."""
    starts = torch.linspace(0, max(len(source) - _PIECE, 0), _TIMES * _PIECES, dtype=torch.int64).tolist()
    pieces = [source[start : start + _PIECE] for start in starts]
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device, priority=-1)):
        target = torch.empty_like(pieces[0], device=device)
        return max(_once(pieces[turn::_TIMES], target) for turn in range(_TIMES))


def _once(pieces: list[torch.Tensor], target: torch.Tensor) -> float:
    torch.cuda.current_stream().synchronize()
    start = time.perf_counter()
    for piece in pieces:
        target.copy_(piece, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return sum(map(len, pieces)) / (time.perf_counter() - start)
