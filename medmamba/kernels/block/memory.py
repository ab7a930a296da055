"""What kernels ask of the tensors that they read by address, and the constants that follow from their types."""

import functools

import torch
from torch import Tensor

from ..backends.cuda import TYPES


def ready(t: Tensor) -> Tensor:
    """Returns t contiguous and aligned for loads of four elements."""
    t = t.contiguous()
    return t if aligned(t) else t.clone()


def aligned(t: Tensor) -> bool:
    return t.data_ptr() % (4 * t.element_size()) == 0


def parameter(t: Tensor) -> Tensor:
    return ready(t.float())


def evenly_spaced(t: Tensor) -> tuple[Tensor, int]:
    """Returns a map, without a copy where possible, and the stride between its pixels in elements."""
    _, H, W, C = t.shape
    if not t.is_contiguous():
        b, h, step, c = t.stride()
        if c == 1 and h == W * step and b == H * h and step % 4 == 0 and step < 2**31 and aligned(t):
            return t, step
    return ready(t), C


@functools.cache
def processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def types(dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    kind = TYPES[dtype]
    return ("X_TYPE", kind), ("P_TYPE", kind), ("Y_TYPE", kind), ("RANK", 1), ("STATES", 1)
