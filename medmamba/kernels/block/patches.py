"""Embedding of image patches on CUDA as one gathering kernel and a matrix product, see `cuda/patches.cu`.

PyTorch's convolutions of three channels leave most of a GPU idle: four times as long, with the bias in one more pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.cuda import TYPES
from ..cuda.nvrtc import load_and_launch
from . import eligibility
from .registry import replaces


@replaces("embed_patches", eligibility.fits_embed_patches)
def embed_patches(x: Tensor, conv: nn.Conv2d) -> Tensor:
    rows, by_channel = patch_rows(x, conv.kernel_size[0], eligibility.computes_in(conv.weight))
    weight = conv.weight if by_channel else conv.weight.permute(0, 2, 3, 1)
    return F.linear(rows, weight.flatten(1), conv.bias)


def patch_rows(x: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """Returns patches of images (B, C, H, W) as rows (B, H/size, W/size, C * size * size) of `dtype`.

    Args:
        x: adjacent in memory are the channels of a pixel or the pixels of a row; copied otherwise.

    Returns:
        The rows, and whether a row holds one channel after the other rather than one pixel after the other.
    """
    B, C, H, W = x.shape
    by_channel = x.stride(3) == 1
    if not by_channel and not (x.stride(1) == 1 and x.stride(3) == C):
        x, by_channel = x.contiguous(), True
    run, runs = (size, C * size) if by_channel else (C * size, size)
    height, width = H // size, W // size
    out = x.new_empty((B, height, width, run * runs), dtype=dtype)
    strides = x.stride(0), x.stride(1) if by_channel else 0, x.stride(2)
    aligned = x.data_ptr() % (4 * x.element_size()) == 0 and not any(stride % 4 for stride in strides)
    vector = 4 if aligned and run % 4 == 0 else 1
    constants = (
        ("X_TYPE", TYPES[x.dtype]), ("P_TYPE", 0), ("Y_TYPE", TYPES[dtype]), ("RANK", 1), ("STATES", 1),
        ("PATCH", size), ("RUN", run), ("RUNS", runs), ("VEC", vector),
    )  # fmt: skip
    threads = out.numel() // vector
    arguments = (x, out, threads, height, width, *strides)
    load_and_launch("patches.cu", "gather_patches", "ppiiilll", constants, 0, -(-threads // 256), 256, x, *arguments)
    return out, by_channel
