"""Launches the Triton kernels on (B, K, L, C) views: K directions over the same pixels, or K groups of channels."""

import math
import threading
from typing import Any

import torch
from torch import Tensor

from .plan import CHUNK, Plan, backward_plan, forward_plan

MAX_INT32 = 2**31 - 1
# Triton compiles and loads a kernel at first launch, and another thread may run it half loaded; its interpreter keeps
# state in globals.
_launching = threading.Lock()


def forward(
    x: Tensor,
    delta: Tensor | None,
    proj: Tensor,
    table: Tensor,
    N: int,
    size: tuple[int, int] | None,
    softplus: bool,
    plan: Plan | None,
    out: Tensor | None = None,
    states: Tensor | None = None,
    last: Tensor | None = None,
) -> None:
    """Fills those of out (B, K, L, C), states (B, K, chunks, N, C) and last (B, K, N, C) that are given.

    Args:
        x, delta: (B, K, L, C), channels contiguous, the same strides. delta None: step sizes are computed from proj.
        proj: (B, K, L, R + 2N), last dimension contiguous. table: (K, N + R + 2, C), see `triton/common.py`.
        size: height and width, for the four directions of a map; None scans every line in order.
    """
    B, K, L, C = x.shape
    plan = plan or forward_plan(B * K, L, C, N, x.device)
    ends, sums = _segment_ends(x, N, plan)
    if ends is not None:
        _walk(x, delta, proj, table, N, size, softplus, plan, ends=ends, sums=sums, ENDS=True)
    _walk(
        x, delta, proj, table, N, size, softplus, plan, out, states, last, ends, sums,
        WRITE=out is not None, SAVE=states is not None, LAST=last is not None, CARRY=ends is not None,
    )  # fmt: skip


def backward(
    dy: Tensor,
    x: Tensor,
    delta: Tensor | None,
    proj: Tensor,
    table: Tensor,
    states: Tensor,
    N: int,
    size: tuple[int, int] | None,
    softplus: bool,
    plan: Plan | None,
    dx: Tensor,
    ddelta: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Fills dx and ddelta (B, K, L, C), of equal strides.

    Returns:
        Gradients of proj, as (B, L, K, P) contiguous and in its dtype, and of table, in float32.
    """
    from .backward import scan_backward_kernel

    B, K, L, C = x.shape
    P = proj.shape[-1]
    R = P - 2 * N
    plan = plan or backward_plan(B * K, L, C, N, x.device)
    blocks = -(-C // plan.block)
    segments, tokens = plan.split(L)
    unit = _unit(proj)
    ends, sums = _segment_ends(x, N, plan)
    if ends is not None:
        _walk(dy, delta, proj, table, N, size, softplus, plan, ends=ends, sums=sums, ENDS=True, ADJOINT=True)

    programs = B * K * segments * blocks
    NP = _power_of_2(N)
    per_program = 3 * CHUNK * plan.block + 2 * CHUNK * NP + CHUNK // plan.unroll * NP * plan.block
    scratch = x.new_empty(programs * per_program, dtype=torch.float32)
    exact = blocks > 1 and not plan.half_sums
    dproj = proj.new_empty((blocks, B, L, K, P), dtype=torch.float32 if exact else proj.dtype)
    dtable = table.new_empty((B * segments, *table.shape))
    _launch(
        scan_backward_kernel, programs,
        dy, x, x if delta is None else delta, proj, table, states, ends, sums, scratch,
        dx, dx if ddelta is None else ddelta, dproj, dtable,
        *(size or (1, L)), L, C, C, blocks, segments, tokens,
        *x.stride()[:3], *dy.stride()[:3], *_units(proj, unit), *dx.stride()[:3], *_line_strides(dproj),
        K=K, N=N, NP=NP, R=R, RP=max(16, _power_of_2(R)), BC=plan.block, VEC=_vector(C, 4), UNIT=unit,
        SUB=plan.unroll, CHUNK=CHUNK, EVEN=C % plan.block == 0, FOLDED=C % 32 == 0,
        WIDE=_wide(x, dy, proj, dx, dproj[0].transpose(1, 2)), PLANAR=size is not None, SOFTPLUS=softplus,
        CARRY=ends is not None, PRECISION=_precision(x.device),
        num_warps=1, maxnreg=plan.registers, enable_fp_fusion=True,
    )  # fmt: skip
    return sum_parts(dproj.view(1, blocks, -1), proj.dtype).view(B, L, K, P), dtable.sum(0)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums (outer, parts, inner) to (outer, inner) in float32, in a fixed order."""
    from .forward import sum_kernel

    outer, count, inner = parts.shape
    if count == 1 and parts.dtype == dtype:
        return parts[:, 0]
    out = parts.new_empty((outer, inner), dtype=dtype)
    blocks = -(-inner // 1024)
    _launch(sum_kernel, outer * blocks, parts, out, inner, blocks, parts=count, BLOCK=1024, num_warps=4)
    return out


def _walk(
    x: Tensor,
    delta: Tensor | None,
    proj: Tensor,
    table: Tensor,
    N: int,
    size: tuple[int, int] | None,
    softplus: bool,
    plan: Plan,
    out: Tensor | None = None,
    states: Tensor | None = None,
    last: Tensor | None = None,
    ends: Tensor | None = None,
    sums: Tensor | None = None,
    *,
    ADJOINT: bool = False,
    WRITE: bool = False,
    SAVE: bool = False,
    LAST: bool = False,
    ENDS: bool = False,
    CARRY: bool = False,
) -> None:
    from .forward import scan_forward_kernel

    B, K, L, C = x.shape
    R = proj.shape[-1] - 2 * N
    blocks = -(-C // plan.block)
    segments, tokens = plan.split(L)
    unit = _unit(proj)
    NP = _power_of_2(N)
    # Pairs of bfloat16 numbers are loaded as one integer if all pairs are aligned.
    packed = proj.dtype == torch.bfloat16 and NP == N > 1 and unit > 1 and R % 2 == 0
    out = x if out is None else out
    _launch(
        scan_forward_kernel, B * K * segments * blocks,
        x, x if delta is None else delta, proj, table, out, states, ends, sums, last,
        *(size or (1, L)), L, C, C, blocks, segments, tokens,
        *x.stride()[:3], *_units(proj, unit), *out.stride()[:3],
        K=K, N=N, NP=NP, R=R, RB=min(16, _power_of_2(R)), BC=plan.block, UNIT=unit,
        VEC=_vector(C, max(1, plan.block // 32)), UNROLL=plan.unroll, CHUNK=CHUNK, EVEN=C % plan.block == 0,
        FOLDED=C % 32 == 0, PACKED=packed,
        WIDE=_wide(x, proj, out), PLANAR=size is not None, SOFTPLUS=softplus, ADJOINT=ADJOINT, WRITE=WRITE, SAVE=SAVE,
        CARRY=CARRY, ENDS=ENDS, LAST=LAST,
        num_warps=1, maxnreg=plan.registers, enable_fp_fusion=True,
    )  # fmt: skip


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    with _launching:
        kernel[(programs,)](*arguments, **constants)


def _segment_ends(x: Tensor, N: int, plan: Plan) -> tuple[Tensor | None, Tensor | None]:
    """Allocates the state after each segment (B, K, S, N, C) and the sum of its step sizes; None without segments."""
    B, K, L, C = x.shape
    segments, _ = plan.split(L)
    if segments == 1:
        return None, None
    shape = (B, K, segments, N, C)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty((*shape[:3], C), dtype=torch.float32)


def _power_of_2(n: int) -> int:
    """Returns the smallest power of 2 that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _vector(channels: int, most: int) -> int:
    """Returns the adjacent channels per thread: the largest power of 2 up to `most` that divides all channels."""
    return math.gcd(channels, most)


def _unit(proj: Tensor) -> int:
    """Returns the largest power of 2 up to 8 that divides the address and strides of proj, in elements."""
    steps = [stride for stride, n in zip(proj.stride()[:3], proj.shape[:3], strict=True) if n > 1]
    return math.gcd(8, proj.data_ptr() // proj.element_size(), *steps)


def _units(proj: Tensor, unit: int) -> list[int]:
    """Returns strides in units, which tells the compiler their alignment. Those of size-1 dimensions do not matter."""
    return [stride // unit for stride in proj.stride()[:3]]


def _line_strides(dproj: Tensor) -> tuple[int, int, int, int]:
    """Returns the strides of (blocks, B, L, K, P) in the order block, b, k, token."""
    block, b, t, k, _ = dproj.stride()
    return block, b, k, t


def _wide(*tensors: Tensor) -> bool:
    """Returns whether addressing the tokens of one line needs 64 bits, which cost several instructions each."""
    return any(t.stride(2) * t.shape[2] > MAX_INT32 for t in tensors)


def _precision(device: torch.device) -> str:
    """Returns the dot precision: three TF32 products, about as exact as float32, from compute capability 8.0."""
    return "tf32x3" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "ieee"
