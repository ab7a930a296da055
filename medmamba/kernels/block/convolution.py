"""A 3x3 convolution on tensor cores for decoders, which reads an enlarged map and a skip connection where they lie.

Libraries compute convolutions of 16 or 32 channels in tiles of 64 and more, and pass over memory again for the bias,
the ReLU, the enlarged map and the joined one. See `cuda/conv3x3.cu`.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cuda.nvrtc import load_and_launch, takes_tensor
from .memory import ready, types

CHUNK = 32  # channels in shared memory at a time, or half as many
WIDTH = 16  # pixels of a tile
WARPS = 4
MOST = 64  # output channels; with 128 a library is as fast with 16 images, and twice as fast with one
EIGHT = 8  # output channels that tensor cores compute together


class Plan(NamedTuple):
    """Parameters of one launch."""

    rows: int  # of pixels per program: 4, 8 or 16
    columns: int  # output channels per program: 16, 32 or 64; 8 for the maps of a head


# From few large programs, which read their input fewer times, to many small ones, which fill a GPU with few images.
PLANS = tuple(Plan(rows, columns) for columns, rows in ((64, 8), (32, 16), (32, 8), (32, 4), (16, 4)))


def fits_weight(weight: Tensor, head: bool = False) -> bool:
    """Returns whether `arranged` takes a weight (O, I, 3, 3), and libraries would be slower with it."""
    out, channels = weight.shape[:2]
    return channels % 16 == 0 and out <= MOST and (head or out % 16 == 0)


def fits(x: Tensor, skip: Tensor | None) -> bool:
    """Returns whether `conv3x3` takes these maps (B, H, W, C) on a GPU."""
    if x.dtype not in (torch.float16, torch.bfloat16) or not takes_tensor(x.get_device()):
        return False
    maps = [x] if skip is None else [x, skip]
    regular = all(m.is_contiguous() and m.shape[-1] % 16 == 0 and m.data_ptr() % 16 == 0 and m.numel() for m in maps)
    return regular and (skip is None or (skip.dtype == x.dtype and skip.device == x.device))


def arranged(weight: Tensor, head: bool = False) -> Tensor:
    """Returns the weight (O, I, 3, 3) of a convolution in the order in which the lanes of a warp take it.

    I is a multiple of 16. O is one too, or with `head` any number, which zeros fill up to a multiple of 8.
    """
    out, channels = weight.shape[:2]
    if head:
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, -out % EIGHT))
        # output channel: (tile, column); input channel: (sixteen, register, lane % 4, which of two)
        split = weight.permute(2, 3, 1, 0).reshape(9, channels // 16, 2, 4, 2, -1, EIGHT)
        return split.permute(1, 0, 5, 6, 3, 2, 4).contiguous().view(-1)
    # A lane computes columns 2t and 2t + 1 of each tile of eight: in two tiles, channels 4t to 4t + 3.
    split = weight.permute(2, 3, 1, 0).reshape(9, channels // 16, 2, 4, 2, out // 16, 4, 2, 2)
    return split.permute(1, 0, 5, 7, 6, 8, 3, 2, 4).contiguous().view(-1)


def conv3x3(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    enlarge: bool = False,
    head: bool = False,
    plan: Plan | None = None,
) -> Tensor:
    """Returns a 3x3 convolution with zero padding: relu(conv(cat(enlarged x, skip))), or conv(x) for a head.

    Args:
        x: (B, H, W, C), in float16 or bfloat16; with `enlarge` (B, H/2, W/2, C), each pixel standing for 2x2.
        skip: (B, H, W, S) or None.
        weight, bias: by `arranged` and (O,), in the dtype of x.
        plan: of the launch, for tuning.

    Returns:
        (B, H, W, O), or of a head (B, O, H, W), in the dtype of x.
    """
    B, H, W, C = x.shape
    H, W = (2 * H, 2 * W) if enlarge else (H, W)
    S, O = 0 if skip is None else skip.shape[-1], len(bias)
    plan = plan or (Plan(16, EIGHT) if head else conv_plan(B, H, W, O, x.get_device()))
    down, across, blocks = -(-H // plan.rows), -(-W // WIDTH), -(-O // plan.columns)
    out = x.new_empty((B, O, H, W) if head else (B, H, W, O))
    chunk = CHUNK if C % CHUNK == S % CHUNK == 0 else CHUNK // 2
    pixels = (plan.rows + 2) * (WIDTH + 2)
    shared = pixels * (chunk + 8) * 2 * min(2, (C + S) // chunk)
    constants = (
        *types(x.dtype),
        *(("FIRST", C), ("UP", int(enlarge)), ("SECOND", S), ("CHUNK", chunk), ("OUT", O), ("COLUMNS", plan.columns)),
        *(("ROWS", plan.rows), ("RELU", int(not head)), ("MAPS", int(head))),
    )
    grid = B * down * across * blocks
    bias = ready(bias)  # it may be a view
    arguments = (x, skip, weight, bias, out, H, W, down, across)
    load_and_launch("conv3x3.cu", "conv3x3", "pppppiiii", constants, shared, grid, 32 * WARPS, x, *arguments)
    return out


@functools.cache
def conv_plan(batch: int, height: int, width: int, channels: int, device: int) -> Plan:
    """Returns the launch: the largest programs of which there are two for each multiprocessor."""
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    plans = [plan for plan in PLANS if channels % plan.columns == 0]
    if channels % 32:
        plans = [Plan(16, 16), Plan(8, 16), *plans]
    for plan in plans:
        programs = batch * -(-height // plan.rows) * -(-width // WIDTH) * (channels // plan.columns)
        if programs >= wanted:
            return plan
    return plans[-1]
