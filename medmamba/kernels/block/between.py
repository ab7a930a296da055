"""From the scan of one block to the depthwise convolution of the next in one kernel, with few channels.

See `cuda/between.cu`. Two kernels of `inference.py` and two of a matrix library do the same for any network. With few
channels each is too small for a GPU, and most of their time is that of launches and of passes over memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..cuda.nvrtc import load_and_launch, takes_tensor
from .memory import types

MOST = 256  # channels: a lane keeps a quarter of those of two pixels in its registers
GROUP = 32  # channels of a warp
TILE = 16  # pixels
THREADS = 128  # of a program, if one tile does not take more


class End(NamedTuple):
    """Weights of the end of a block: the norm and projection of its scan branch."""

    weight: Tensor  # (C,) in float32, as is the bias
    bias: Tensor
    eps: float
    project: Tensor  # by `arranged_linear`


class Begin(NamedTuple):
    """Weights of the beginning of a block: the affine of its left half, norm and projection of the right one."""

    scale: Tensor  # (C/2,) in float32, as are those up to `bias`
    shift: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    expand: Tensor  # by `arranged_linear`


def fits(widths: Sequence[int], expand: int, weight: Tensor) -> bool:
    """Returns whether `between` runs the blocks of a network.

    Args:
        widths: channels of each stage.
        expand: inner channels of a scan branch over its input channels; with 2 they are those of the block.
        weight: one whose dtype and device the others share.
    """
    if weight.dtype not in (torch.float16, torch.bfloat16) or max(widths) > MOST or any(C % GROUP for C in widths):
        return False
    if expand != 2:
        return False
    return takes_tensor(weight.get_device())


def arranged_linear(weight: Tensor) -> Tensor:
    """Returns the weight (O, I) of a linear layer, both multiples of 16, in the order in which lanes take it."""
    out, channels = weight.shape
    # A lane reads four adjacent input channels, and computes four adjacent output channels in two products.
    split = weight.reshape(out // 16, 4, 2, 2, channels // 16, 4, 2, 2)
    return split.permute(0, 4, 1, 3, 5, 2, 6, 7).contiguous().view(-1)


def between(
    x: Tensor,
    mixed: tuple[Tensor, Tensor, Tensor] | None,
    end: End | None,
    begin: Begin | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Ends one block and begins the next.

    Args:
        x: (B, H, W, C) the input of the block that ends.
        mixed, end: of that block; None before the first of a stage. The output of the convolution branch before its
            last ReLU (B, H, W, C/2), the parts of the scan (B, 4, L, C), and the gate (B, H, W, C), which may be half
            of a wider map.
        begin: of the next block; None after the last of a stage.

    Returns:
        The output of the block, and of the next the input of its convolution branch (B, H, W, C/2) and the projection
        of its scan branch (B, H, W, 2C).
    """
    B, H, W, C = x.shape
    pixels = B * H * W
    left, parts, gate = mixed or (None, None, None)
    out = torch.empty_like(x) if mixed else x
    next_left, wide = (x.new_empty((B, H, W, C // 2)), x.new_empty((B, H, W, 2 * C))) if begin else (None, None)
    weight, bias, eps, project = end or (None, None, 0.0, None)
    scale, shift, next_weight, next_bias, next_eps, expand = begin or (None, None, None, None, 0.0, None)
    tiles = max(1, THREADS // C)  # a tile takes as many threads as there are channels
    constants = (
        *types(x.dtype),
        *(("CHANNELS", C), ("MIX", int(mixed is not None)), ("SPLIT", int(begin is not None)), ("TILES", tiles)),
    )
    arguments = (
        *(parts, gate, weight, bias, project, x, left, out, scale, shift, next_weight, next_bias, expand),
        *(next_left, wide, pixels, H * W, 0 if gate is None else gate.stride(2), eps, next_eps),
    )
    grid, threads = -(-pixels // (TILE * tiles)), C * tiles
    load_and_launch("between.cu", "between", 15 * "p" + "liiff", constants, 0, grid, threads, x, *arguments)
    return out, next_left, wide
