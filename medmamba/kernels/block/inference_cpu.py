"""The functions of `inference.py` on CPUs, by the C library of the backend "native"; see `csrc/pixels.h`.

Feature maps are (B, H, W, C) and contiguous unless said otherwise, in float32, float16 or bfloat16; `weight`, `bias`,
`scale` and `shift` are (C,) in float32.
"""

import ctypes

import torch
from torch import Tensor

from ..backends.cpu import BACKEND, ELEMENT_TYPES, call_library


class Pixels(ctypes.Structure):
    """Mirrors `Pixels` of csrc/scan.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "H", "W", "C", "threads", "type", "pixels", "step", "gather")),
        *((name, ctypes.c_void_p) for name in ("x", "left", "right", "scale", "shift", "weight", "bias")),
        *((name, ctypes.c_void_p) for name in ("out", "next_left", "next_right")),
        ("eps", ctypes.c_float),
    ]


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
    y = BACKEND.scan_2d(x, proj, dt_weight, dt_bias, A, D, x.new_empty(0, dtype=torch.float32))
    out = torch.empty_like(y)
    _run("gate_norm", y, out, step=gate.stride(2), right=gate, weight=weight, bias=bias, eps=eps)
    return out


def mix_split(
    x: Tensor,
    mixed: tuple[Tensor, Tensor] | None,
    split: tuple[Tensor, Tensor, Tensor, Tensor, float] | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Ends one block and begins the next, as `inference.mix_split`."""
    left, right = mixed or (None, None)
    out = torch.empty_like(x) if mixed else x
    half = (*x.shape[:-1], x.shape[-1] // 2)
    next_left, next_right = (x.new_empty(half), x.new_empty(half)) if split else (None, None)
    scale, shift, weight, bias, eps = split or (None, None, None, None, 0.0)
    _run(
        "mix_split", x, out, eps=eps, left=left, right=right, scale=scale, shift=shift, weight=weight, bias=bias,
        next_left=next_left, next_right=next_right,
    )  # fmt: skip
    return out, next_left, next_right


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Returns layer_norm(x) over the channels."""
    out = torch.empty_like(x)
    _run("norm", x, out, weight=weight, bias=bias, eps=eps)
    return out


def gather_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Returns layer_norm of 2x2 patches, (B, H/2, W/2, 4C); an odd last row or column is dropped."""
    B, H, W, C = x.shape
    out = x.new_empty((B, H // 2, W // 2, 4 * C))
    _run("norm", x, out, gather=1, weight=weight, bias=bias, eps=eps)
    return out


def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns silu(3x3 depthwise convolution): x (B, H, W, C), possibly half of a wider map; weight (9, C)."""
    out = x.new_empty(x.shape)
    _run("depthwise_silu", x, out, step=x.stride(2), weight=weight, bias=bias)
    return out


def _run(
    function: str, x: Tensor, out: Tensor, step: int = 0, gather: int = 0, eps: float = 0.0, **tensors: Tensor | None
) -> None:
    B, H, W, _ = x.shape
    C = out.shape[-1]
    pointers = {name: t.data_ptr() for name, t in (tensors | {"x": x, "out": out}).items() if t is not None}
    numbers = B, H, W, C, torch.get_num_threads(), ELEMENT_TYPES[x.dtype], out.numel() // C, step, gather
    call_library(function, Pixels(*numbers, **pointers, eps=eps))
