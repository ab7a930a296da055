"""Launch parameters of the Triton kernels by the shape of the scan: channels per program and splits of the length.

The numbers come from instruction counts of the compiled kernels; `benchmarks/scan_gpu.py` sweeps them on a GPU.
"""

import functools
from dataclasses import dataclass

import torch

CHUNK = 16  # tokens between the states saved for the backward pass


@dataclass(frozen=True)
class Plan:
    """One launch of the forward or of the backward kernel."""

    block: int  # channels per program, a power of 2
    unroll: int  # tokens loaded together; in the backward pass, tokens whose states are held in registers
    segments: int = 1  # parallel pieces of the length; more than one needs a second pass over the tokens
    half_sums: bool = False  # store partial sums in the dtype of the result: less memory, twice the error
    registers: int | None = None  # maximum per thread; None leaves it to the compiler

    def split(self, length: int) -> tuple[int, int]:
        """Returns (segments, tokens per segment), in whole chunks and without empty segments."""
        tokens = -(-length // self.segments)
        tokens = -(-tokens // CHUNK) * CHUNK
        return -(-length // tokens), tokens


def forward_plan(lines: int, length: int, channels: int, state: int, device: torch.device) -> Plan:
    """Returns the forward launch for `lines` = batch * directions independent scans."""
    block = _block(channels, 64 if _padded(state) <= 16 else 32)
    if lines * -(-channels // block) < 8 * _processors(device):  # fewer than two warps per scheduler
        block = min(block, 32)
    return Plan(block, 4, _segments(lines * -(-channels // block), length, device))


def backward_plan(lines: int, length: int, channels: int, state: int, device: torch.device) -> Plan:
    # For each of the `unroll` tokens, a thread holds padded * block / 32 states and as many decays: 128 registers.
    block = max(16, _block(channels, 32 if _padded(state) <= 16 else 16))
    unroll = 4 if _padded(state) * block <= 512 else 2
    return Plan(block, unroll, _segments(lines * -(-channels // block), length, device))


def _padded(state: int) -> int:
    return 1 << (state - 1).bit_length()


def _block(channels: int, largest: int) -> int:
    """Returns the largest power of 2 up to `largest` that idles at most an eighth of the threads, else 32 or less."""
    block = largest
    while block > 32 and (-channels) % block > channels // 8:
        block //= 2
    while block > 16 and block // 2 >= channels:
        block //= 2
    return block


def _segments(programs: int, length: int, device: torch.device) -> int:
    """Returns the number of segments: splitting pays off only from four on, when most of the GPU would idle."""
    segments = min(8 * _processors(device) // max(1, programs), length // CHUNK)
    return segments if segments >= 4 else 1


@functools.lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
