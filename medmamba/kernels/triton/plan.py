"""How the Triton kernels are launched, from the shape of the scan: channels per program, and how the length is split.

The numbers come from instruction counts of the compiled kernels; `benchmarks/scan_gpu.py` sweeps them on a GPU.
"""

import functools
from dataclasses import dataclass

import torch

CHUNK = 16  # tokens between the states that the forward pass saves for the backward pass


@dataclass(frozen=True)
class Plan:
    """One launch of the forward or of the backward kernel."""

    block: int  # channels per program, a power of 2
    unroll: int  # tokens whose loads are issued together; in the backward pass, whose states are held in registers
    segments: int = 1  # pieces of the length that run in parallel; more than one costs a second walk along the tokens
    half_sums: bool = False  # round what is yet to be summed to the dtype of the result: less memory, twice the error
    registers: int | None = None  # at most, per thread; None leaves it to the compiler

    def split(self, length: int) -> tuple[int, int]:
        """(segments, tokens per segment): whole chunks, and no empty segment."""
        tokens = -(-length // self.segments)
        tokens = -(-tokens // CHUNK) * CHUNK
        return -(-length // tokens), tokens


def forward_plan(lines: int, length: int, channels: int, state: int, device: torch.device) -> Plan:
    """For `lines` = batch * directions independent scans."""
    block = _block(channels, 64 if _padded(state) <= 16 else 32)
    if lines * -(-channels // block) < 8 * _processors(device):  # too few for two warps per scheduler
        block = min(block, 32)
    return Plan(block, 4, _segments(lines * -(-channels // block), length, device))


def backward_plan(lines: int, length: int, channels: int, state: int, device: torch.device) -> Plan:
    # Of each of the `unroll` tokens, a thread holds padded * block / 32 states and as many decays: 128 registers.
    block = max(16, _block(channels, 32 if _padded(state) <= 16 else 16))
    unroll = 4 if _padded(state) * block <= 512 else 2
    return Plan(block, unroll, _segments(lines * -(-channels // block), length, device))


def _padded(state: int) -> int:
    return 1 << (state - 1).bit_length()


def _block(channels: int, largest: int) -> int:
    """The largest power of 2 up to `largest` that leaves at most an eighth of the threads idle, or else 32 or less."""
    block = largest
    while block > 32 and (-channels) % block > channels // 8:
        block //= 2
    while block > 16 and block // 2 >= channels:
        block //= 2
    return block


def _segments(programs: int, length: int, device: torch.device) -> int:
    """Splitting pays only where most of the chip would idle: from four pieces on, two walks beat one."""
    segments = min(8 * _processors(device) // max(1, programs), length // CHUNK)
    return segments if segments >= 4 else 1


@functools.lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
