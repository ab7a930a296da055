"""Training kernels around the scan: differentiable functions with one CUDA kernel per pass; see `cuda/train.cu` and
`cuda/train_conv.cu`. `model/network.py` defines what they compute, `eligibility.py` when they run.

Maps are (B, H, W, C) in float32, float16 or bfloat16. Everything is computed in float32 and rounded once, to the dtype
of the map; gradients of parameters are summed in a fixed order. These are autograd functions rather than operators of
`torch.library` because nothing ever traces them, a call takes half to two thirds of the time, and they can return an
input itself, so that its gradient is added in the same kernel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from ..cuda import nvrtc
from ..cuda.nvrtc import launch
from ..once import once
from . import eligibility
from .autocast import in_its_types
from .derivatives import differentiable_once
from .memory import evenly_spaced, parameter, processors, ready, types
from .registry import replaces

SPLIT, GATE, MERGE, ALONE = range(4)  # OP of cuda/train.cu
WARPS = 4
PROGRAMS = 4  # per multiprocessor, where programs sum over all pixels: as many as are resident at once
# Pixels in rows that a thread convolves at a time; that of the backward pass keeps its inputs in registers.
CONV_TILES = {"conv_forward": (8, 2), "conv_input": (8, 2), "conv_backward": (4, 1)}
ALL_PIXELS = (1, 1, 1, 0)  # sizes of a map for kernels that can gather 2x2 patches, when they do not
SIGNATURES = {  # of the kernels; see `nvrtc.Kernel`
    "norm_forward": "ppppppp" + "liiiilf",
    "norm_backward": "pppppppppp" + "liiiilf",
    "conv_forward": "ppppiiiii",
    "conv_backward": "ppppppiiiii",
    "conv_input": "ppppiiiii",
    "mix_forward": "pppppii",
    "mix_backward": "ppppii",
}


# --- pieces of the network that the functions below replace ---------------------------------------------------------


@replaces("split_norm", eligibility.fits_split_norm)
def split_norm(x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor, Tensor]:
    return SplitNorm.apply(x, norm.weight, norm.bias, norm.eps)


@replaces("channel_norm", eligibility.fits_channel_norm)
def channel_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return Norm.apply(x, norm.weight, norm.bias, norm.eps, False)


@replaces("merge_norm", eligibility.fits_merge_norm)
def merge_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return Norm.apply(x, norm.weight, norm.bias, norm.eps, True)


@replaces("conv_silu", eligibility.fits_conv_silu)
def conv_silu(wide: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    return ConvSilu.apply(wide, conv.weight, conv.bias)


@replaces("gate_project", eligibility.fits_gate_project)
def gate_project(y: Tensor, gate: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    return GateProject.apply(y, gate, norm.weight, norm.bias, norm.eps, linear.weight)


@replaces("mix", eligibility.fits_mix)
def mix(x: Tensor, left: Tensor, right: Tensor, drop_path: Any) -> Tensor:
    return Mix.apply(x, left, right, drop_path.keep_mask(right))


# --- differentiable functions ---------------------------------------------------------------------------------------


class SplitNorm(Function):
    """Maps x (B, H, W, 2C) to x itself, its left half, and the layer norm of its right half, (B, H, W, C) each.

    Saves a copy of the right half, so that x, twice as large, need not outlive the block.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        own, ctx.dtype, ctx.eps = ready(x), weight.dtype, eps
        weight, bias = parameter(weight), parameter(bias)
        half = (*x.shape[:-1], x.shape[-1] // 2)
        left, normed = x.new_empty(half), x.new_empty(half)
        right = x.new_empty(half) if any(ctx.needs_input_grad) else None
        _norm_forward(SPLIT, own, None, 0, weight, bias, normed, left, ALL_PIXELS, eps, right)
        ctx.save_for_backward(right, weight)
        return x, left, normed

    @staticmethod
    @differentiable_once
    def backward(ctx, dx, dleft, dnormed):
        right, weight = ctx.saved_tensors
        gradient = dx.new_empty(dx.shape)
        beside = None, 0, weight, None, ready(dleft), ready(dx)
        parameters = _norm_backward(ctx, 1, SPLIT, dnormed, right, *beside, gradient, None, ALL_PIXELS)
        return gradient, *parameters, None


class GateProject(Function):
    """Computes linear(layer_norm(y) * silu(gate)): y and gate (B, H, W, C), matrix (O, C), to (B, H, W, O).

    The gate may be half of a wider map. The gated map is recomputed in the backward pass instead of saved.
    """

    @staticmethod
    def forward(ctx, y, gate, weight, bias, eps, matrix):
        y, ctx.dtype, ctx.matrix_dtype, ctx.eps = ready(y), weight.dtype, matrix.dtype, eps
        gate, ctx.step = evenly_spaced(gate)
        weight, bias, matrix = parameter(weight), parameter(bias), matrix.to(y.dtype)
        ctx.save_for_backward(y, gate, weight, bias, matrix)
        return F.linear(_gated(ctx, y, gate, weight, bias), matrix)

    @staticmethod
    @differentiable_once
    @in_its_types
    def backward(ctx, dout):
        y, gate, weight, bias, matrix = ctx.saved_tensors
        gate, ctx.step = evenly_spaced(gate)  # hooks of saved tensors may bring it back with other strides
        dmatrix = None
        if ctx.needs_input_grad[5]:
            gated = _gated(ctx, y, gate, weight, bias)
            dmatrix = (dout.flatten(0, 2).mT @ gated.flatten(0, 2)).to(ctx.matrix_dtype)
        dy, dgate = torch.empty_like(y), torch.empty_like(y)
        beside = gate, ctx.step, weight, bias, None, None
        parameters = _norm_backward(ctx, 2, GATE, dout @ matrix, y, *beside, dy, dgate, ALL_PIXELS)
        return dy, dgate, *parameters, None, dmatrix


class Norm(Function):
    """Computes layer_norm(x) (B, H, W, C), or with `merge` that of each 2x2 patch (B, H/2, W/2, 4C)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, merge):
        x, ctx.dtype, ctx.eps = ready(x), weight.dtype, eps
        weight, bias = parameter(weight), parameter(bias)
        B, H, W, C = x.shape
        ctx.op, ctx.sizes, shape = ALONE, ALL_PIXELS, x.shape
        if merge:
            ctx.op, ctx.sizes, shape = MERGE, (H // 2, W // 2, W, H * W * C), (B, H // 2, W // 2, 4 * C)
        out = x.new_empty(shape)
        _norm_forward(ctx.op, x, None, 0, weight, bias, out, None, ctx.sizes, eps)
        ctx.save_for_backward(x, weight)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        _, H, W, _ = x.shape
        left_out = ctx.op == MERGE and (H % 2 or W % 2)
        dx = torch.zeros_like(x) if left_out else torch.empty_like(x)
        parameters = _norm_backward(ctx, 1, ctx.op, dout, x, None, 0, weight, None, None, None, dx, None, ctx.sizes)
        return dx, *parameters, None, None


class ConvSilu(Function):
    """Maps wide (B, H, W, 2C) to silu(depthwise 3x3 convolution of its left half) and a view of its right half."""

    @staticmethod
    def forward(ctx, wide, weight, bias):
        own, ctx.dtype = ready(wide), weight.dtype
        weight, bias = parameter(weight), parameter(bias)
        C = wide.shape[-1] // 2
        out = wide.new_empty((*wide.shape[:-1], C))
        plan = conv_plan("conv_forward", C, False, wide.dtype, wide.get_device())
        programs, sizes = plan.share(wide.shape)
        launch(plan.kernel, programs * plan.blocks, plan.threads, wide, own, weight, bias, out, *sizes)
        ctx.save_for_backward(own, weight, bias)
        return out, wide[..., C:]

    @staticmethod
    @differentiable_once
    def backward(ctx, dout, dgate):
        wide, weight, bias = ctx.saved_tensors
        wanted, C, device = any(ctx.needs_input_grad[1:]), dout.shape[-1], wide.get_device()
        dout, dgate = ready(dout), ready(dgate)
        dpre, dwide, dweight, dbias = torch.empty_like(dout), None, None, None
        plan = conv_plan("conv_backward", C, wanted, wide.dtype, device)
        programs, sizes = plan.share(wide.shape)
        partials = wide.new_empty((programs, 10 * C), dtype=torch.float32) if wanted else None
        tensors = dout, wide, weight, bias, dpre, partials
        launch(plan.kernel, programs * plan.blocks, plan.threads, wide, *tensors, *sizes)
        if partials is not None:
            dweight, dbias = sum_programs(partials).to(ctx.dtype).split((9 * C, C))
            dweight = dweight.view(C, 1, 3, 3)
        if ctx.needs_input_grad[0]:
            dwide = torch.empty_like(wide)
            plan = conv_plan("conv_input", C, False, wide.dtype, device)
            programs, sizes = plan.share(wide.shape)
            launch(plan.kernel, programs * plan.blocks, plan.threads, wide, dpre, dgate, weight, dwide, *sizes)
        return dwide, dweight, dbias


class Mix(Function):
    """Adds left and right (B, H, W, C), channels interleaved, to x (B, H, W, 2C); right scaled by keep (B, 1, 1, 1)."""

    @staticmethod
    def forward(ctx, x, left, right, keep):
        x = ready(x)
        out = torch.empty_like(x)
        _mix("mix_forward", x, keep, x, ready(left), ready(right), keep, out)
        ctx.save_for_backward(keep)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, dout):
        (keep,) = ctx.saved_tensors
        half = (*dout.shape[:-1], dout.shape[-1] // 2)
        dleft, dright = dout.new_empty(half), dout.new_empty(half)
        _mix("mix_backward", dout, keep, ready(dout), keep, dleft, dright)
        return dout, dleft, dright, None


# --- norms ----------------------------------------------------------------------------------------------------------


def _gated(ctx: Any, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = torch.empty_like(y)
    _norm_forward(GATE, y, gate, ctx.step, weight, bias, out, None, ALL_PIXELS, ctx.eps)
    return out


def _norm_forward(
    op: int,
    x: Tensor,
    gate: Tensor | None,
    gate_step: int,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    left: Tensor | None,
    sizes: tuple[int, int, int, int],
    eps: float,
    right: Tensor | None = None,
) -> None:
    C = weight.numel()
    kernel, together = norm_kernel("norm_forward", op, C, False, x.dtype, x.get_device())
    rows = out.numel() // C
    tensors = x, gate, weight, bias, out, left, right
    launch(kernel, -(-rows // together), 32 * WARPS, x, *tensors, rows, gate_step, *sizes, eps)


def _norm_backward(
    ctx: Any,
    first: int,
    op: int,
    dout: Tensor,
    x: Tensor,
    gate: Tensor | None,
    gate_step: int,
    weight: Tensor,
    bias: Tensor | None,
    dleft: Tensor | None,
    dwhole: Tensor | None,
    dx: Tensor,
    dgate: Tensor | None,
    sizes: tuple[int, int, int, int],
) -> tuple[Tensor | None, ...]:
    """Fills dx and dgate, and returns the gradients of weight and bias, or (None, None) if neither is needed.

    Weight and bias are inputs `first` and `first` + 1 of the autograd function.
    """
    C, device, wanted = weight.numel(), x.get_device(), any(ctx.needs_input_grad[first : first + 2])
    kernel, together = norm_kernel("norm_backward", op, C, wanted, x.dtype, device)
    rows = dout.numel() // C
    programs = norm_programs(rows, together, device)
    partials = x.new_empty((programs, 2, C), dtype=torch.float32) if wanted else None
    tensors = ready(dout), x, gate, weight, bias, dleft, dwhole, dx, dgate, partials
    launch(kernel, programs, 32 * WARPS, x, *tensors, rows, gate_step, *sizes, ctx.eps)
    return (None, None) if partials is None else sum_programs(partials).to(ctx.dtype).unbind(0)


def sum_programs(partials: Tensor) -> Tensor:
    """Sums (programs, ...) over the programs, in a fixed order; the rest has a multiple of eight numbers."""
    out = torch.empty_like(partials[0])
    half = out.numel() // 2
    kernel = sum_kernel(half, partials.get_device())
    launch(kernel, -(-half // 32), 512, partials, partials, out, len(partials))
    return out


@once
def sum_kernel(half: int, device: int) -> Callable[..., None]:
    constants = types(torch.float32) + (("CHANNELS", half), ("THREADS", 256), ("RELU", 0))
    return nvrtc.load_kernel("batch.cu", "add_partials", "ppi", constants, 0, device)


@once
def norm_kernel(
    name: str, op: int, C: int, params: bool, dtype: torch.dtype, device: int
) -> tuple[Callable[..., None], int]:
    """Returns the kernel and the number of rows that a program processes at a time."""
    lanes = row_lanes(C)
    constants = types(dtype) + (
        ("OP", op), ("CHANNELS", C), ("LANES", lanes), ("WARPS", WARPS), ("PARAMS", int(params)), ("FACTORS", 0),
    )  # fmt: skip
    return nvrtc.load_kernel("train.cu", name, SIGNATURES[name], constants, 0, device), WARPS * (32 // lanes)


def norm_programs(rows: int, together: int, device: int) -> int:
    """Returns the programs of a backward pass that take `together` rows at a time."""
    return min(-(-rows // together), PROGRAMS * processors(device))


def row_lanes(C: int) -> int:
    """Returns the lanes that share a row of C numbers: the fewest with at most 12 numbers per lane."""
    lanes = 1
    while lanes < 32 and 12 * lanes < C:
        lanes *= 2
    return lanes


# --- convolution and mixing -----------------------------------------------------------------------------------------


class ConvPlan(NamedTuple):
    kernel: Callable[..., None]
    strip: int  # pixels
    rows: int
    threads: int
    together: int  # strips that a program processes at a time
    blocks: int  # of channels
    most: int  # programs for one block of channels

    def share(self, shape: tuple[int, ...]) -> tuple[int, tuple[int, int, int, int, int]]:
        """Returns the programs per block of channels, and the sizes that the kernel takes, for maps (B, H, W, C)."""
        B, H, W, _ = shape
        strips = -(-W // self.strip)
        total = B * -(-H // self.rows) * strips
        return min(-(-total // self.together), self.most), (total, H, W, strips, self.blocks)


@once
def conv_plan(name: str, C: int, params: bool, dtype: torch.dtype, device: int) -> ConvPlan:
    strip, rows = CONV_TILES[name]
    blocks = -(-C // 512)
    pairs = -(-C // (2 * blocks))
    together = max(1, 256 // pairs)
    whole = [count for count in range(together, 0, -1) if count * pairs % 32 == 0 and 2 * count > together]
    together = whole[0] if whole else together  # whole warps, if that costs few threads
    threads = together * pairs
    occupancy = 2 if name == "conv_backward" else 4 if threads * rows * strip <= 192 * 8 else 3
    constants = types(dtype) + (
        ("CHANNELS", C), ("WIDTH", pairs), ("THREADS", threads), ("STRIP", strip), ("ROWS", rows),
        ("OCCUPANCY", occupancy), ("PARAMS", int(params)),
    )  # fmt: skip
    kernel = nvrtc.load_kernel("train_conv.cu", name, SIGNATURES[name], constants, 0, device)
    waves = 1 if name == "conv_backward" else 2  # more programs leave more partial sums to add
    most = waves * occupancy * processors(device) // blocks
    return ConvPlan(kernel, strip, rows, threads, together, blocks, max(1, most))


def _mix(name: str, x: Tensor, keep: Tensor | None, *tensors: Tensor | None) -> None:
    threads = x.numel() // 8
    kernel = mix_kernel(name, keep is not None, x.dtype, x.get_device())
    launch(kernel, -(-threads // 256), 256, x, *tensors, threads, threads // x.shape[0])


@once
def mix_kernel(name: str, scaled: bool, dtype: torch.dtype, device: int) -> Callable[..., None]:
    constants = types(dtype) + (
        ("OP", ALONE), ("CHANNELS", 4), ("LANES", 1), ("WARPS", WARPS), ("PARAMS", 0), ("FACTORS", int(scaled)),
    )  # fmt: skip
    return nvrtc.load_kernel("train.cu", name, SIGNATURES[name], constants, 0, device)
