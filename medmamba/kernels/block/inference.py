"""Inference kernels around the scan, each one pass over memory; see `cuda/fused.cu` and `cuda/depthwise.cu`.

Feature maps are (B, H, W, C) and contiguous unless said otherwise, C a multiple of 4, in float32, float16 or bfloat16;
`weight`, `bias`, `scale` and `shift` are (C,) in float32.
"""

import torch
from torch import Tensor

from ..backends.cuda import scan_parts
from ..cuda.nvrtc import load_and_launch
from .memory import types

WARPS = 4
TILES = ((8, 2), (2, 1))  # pixels in rows that a thread convolves; the latter keep a GPU busy with at most FEW numbers
FEW = 2**22


def scan_gate(
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """Returns silu(gate) * layer_norm(scan_2d(...)), (B, H, W, C). `gate` may be half of a wider map."""
    B, H, W, C = x.shape
    parts = scan_parts(x, proj, dt_weight, dt_bias, A, D)
    out = x.new_empty(x.shape)
    pixels = B * H * W
    arguments = (parts, gate, weight, bias, out, pixels, H * W, gate.stride(2), eps)
    _rows("merge_gate", "pppppliif", x, C, pixels, (), *arguments)
    return out


def mix_split(
    x: Tensor,
    mixed: tuple[Tensor, Tensor] | None,
    split: tuple[Tensor, Tensor, Tensor, Tensor, float] | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Ends one block and begins the next.

    Args:
        x: (B, H, W, C) the input of the block.
        mixed: the outputs of its branches (B, H, W, C/2), left before the last ReLU; None before the first block.
        split: of the next block, scale and shift of the left half, weight, bias and eps of the right half's norm; None
            after the last block.

    Returns:
        x + the shuffled branches, and the inputs of the next block's branches, (B, H, W, C/2) each.
    """
    C = x.shape[-1]
    pixels = x.numel() // C
    left, right = mixed or (None, None)
    out = torch.empty_like(x) if mixed else x
    half = (*x.shape[:-1], C // 2)
    next_left, next_right = (x.new_empty(half), x.new_empty(half)) if split else (None, None)
    scale, shift, weight, bias, eps = split or (None, None, None, None, 0.0)
    arguments = (x, left, right, scale, shift, weight, bias, out, next_left, next_right, pixels, eps)
    flags = (("MIX", int(mixed is not None)), ("SPLIT", int(split is not None)))
    _rows("mix_split", "pppppppppplf", x, C, pixels, flags, *arguments)
    return out, next_left, next_right


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Returns layer_norm(x) over the channels."""
    out = torch.empty_like(x)
    pixels = x.numel() // x.shape[-1]
    arguments = (x, weight, bias, out, pixels, 1, 1, 1, 0, eps)
    _rows("gather_norm", "pppp" + "liiil" + "f", x, x.shape[-1], pixels, (("GATHER", 0),), *arguments)
    return out


def gather_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Returns layer_norm of 2x2 patches, (B, H/2, W/2, 4C); an odd last row or column is dropped."""
    B, H, W, C = x.shape
    out = x.new_empty((B, H // 2, W // 2, 4 * C))
    pixels = out.numel() // (4 * C)
    arguments = (x, weight, bias, out, pixels, H // 2, W // 2, W, H * W * C, eps)
    _rows("gather_norm", "pppp" + "liiil" + "f", x, 4 * C, pixels, (("GATHER", 1),), *arguments)
    return out


def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns silu(3x3 depthwise convolution): x (B, H, W, C), possibly half of a wider map; weight (9, C)."""
    B, H, W, C = x.shape
    out = x.new_empty(x.shape)
    strip, rows = TILES[B * H * W * C <= FEW]
    strips, bands = -(-W // strip), -(-H // rows)
    threads = B * bands * strips * (C // 2)
    constants = (*types(x.dtype), ("CHANNELS", C), ("STRIP", strip), ("ROWS", rows), ("STEP", x.stride(2)))
    arguments = (x, weight, bias, out, threads, H, W, strips, bands, x.stride(0))
    grid = -(-threads // 256)
    load_and_launch("depthwise.cu", "depthwise_silu", "pppp" + "iiiiil", constants, 0, grid, 256, x, *arguments)
    return out


def _rows(name: str, signature: str, x: Tensor, channels: int, pixels: int, flags: tuple, *arguments) -> None:
    every = {"MIX": 0, "SPLIT": 0, "GATHER": 0} | dict(flags)
    constants = (*types(x.dtype), ("CHANNELS", channels), ("WARPS", WARPS), *every.items())
    load_and_launch("fused.cu", name, signature, constants, 0, -(-pixels // WARPS), 32 * WARPS, x, *arguments)
