"""Launches the kernels of the one-dimensional scan, `lines.cu` and `lines_backward.cu`; `lines.cuh` describes them.

They read u, delta and their gradients where they lie, each line of tokens in one piece, and B and C with any strides.
Beside their outputs, they take a few numbers per line.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .nvrtc import TYPES, load_and_launch

MOST_STATES = 16
STEP = 8  # consecutive tokens of a thread
OFFSETS = 2**32  # bytes within one sequence, which the kernels count in 32 bits
FEW = 4  # warps that walk along lines on a multiprocessor, below which lanes lie along the lines instead
MANY = 4  # programs of segments per multiprocessor, from which they are small
FULL = 12  # warps of the second kernel of the backward pass on a multiprocessor


class Plan(NamedTuple):
    """Parameters of the launches of a scan."""

    warps: int = 4  # per program of the walk along lines
    resident: int = 1  # such programs per multiprocessor to compile for
    gradient_resident: int = 1  # the same, in the backward pass
    packed: int = 0  # forward: 1 to keep B and C in 16 bits in shared memory
    across: int = 0  # forward: unless 0, the lanes of a warp lie along the lines, and a program has so many warps
    rows: int = 1  # backward: channels of a warp at the same time
    segment_warps: int = 4  # backward: per program of a segment
    parts: int = 1  # backward: programs that share the channels of a group and a segment
    segment_resident: int = 1  # such programs per multiprocessor to compile for


def covers(channels: int, length: int, states: int) -> bool:
    """Returns whether the kernels scan sequences of that size."""
    return states <= MOST_STATES and channels * length * 4 < OFFSETS


def spread(states: int) -> tuple[int, int]:
    """Returns the states per lane and the lanes per channel."""
    return (1 << (states - 1).bit_length(), 1) if states <= 4 else (4, 2 if states <= 8 else 4)


def segment_length(states: int, rows: int) -> int:
    """Returns the tokens of a segment of the backward pass, of which a warp has that many channels at a time."""
    return STEP * 32 // spread(states)[1] // rows


@functools.cache
def plan_for(batch: int, channels: int, groups: int, length: int, states: int, device: int) -> Plan:
    """Returns the launches for a scan on a device."""
    per, lanes = spread(states)
    group = channels // groups
    rows = 1
    while rows * lanes < (8 if lanes == 4 else 4) and length <= segment_length(states, 2 * rows):
        rows *= 2  # a line that is shorter would leave lanes idle
    # What follows was measured on an H200. The fewest idle warps; of equals, the largest programs, as they read B and C
    # less often.
    each = 32 // lanes
    warps = min((4, 3, 2, 1), key=lambda w: (-(-group // (w * each)) * w, -w))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = FULL * processors
    programs = batch * groups * -(-length // segment_length(states, rows))
    most = -(-group // rows)  # warps that have a channel
    segment_warps = min(4 if programs >= MANY * processors else 6 if 36 * programs >= 5 * wanted else FULL, most)
    parts = 1
    while 6 * programs * parts * segment_warps < 5 * wanted and 2 * parts * segment_warps <= most:
        parts *= 2
    resident = (4 if per == 4 else 5) if segment_warps == 4 else max(1, FULL // segment_warps)
    few = batch * channels * lanes < 32 * FEW * processors
    across = min(8 if per == 1 else 4, most) if few or per == 1 else 0
    return Plan(warps, 16 // warps, 12 // warps, int(lanes == 4), across, rows, segment_warps, parts, resident)


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    softplus: bool,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """Scans sequences. Arguments and results as of `Backend.scan_1d`; A has at most 16 states."""
    batch, channels, length = u.shape
    u, delta, (B, C) = _lines(u), _lines(delta), _alike(B, C)
    A, D, delta_bias = (t.float().contiguous() for t in (A, D, delta_bias))
    groups, N = B.shape[1:3]
    plan = plan or plan_for(batch, channels, groups, length, N, u.get_device())
    y = u.new_empty((batch, channels, length))
    last = u.new_empty((batch, channels, N), dtype=torch.float32)
    width = _width((u, delta), length)
    if not plan.across:
        _walk(u, delta, A, B, C, D, delta_bias, softplus, plan, width, y=y, last=last)
        return y, last
    blocks = -(-channels // groups // (plan.across * plan.rows))
    constants = (
        *_constants(u, delta, B, C, softplus, width, plan),
        ("WARPS", plan.across),
        ("RESIDENT", 16 // plan.across),
    )
    load_and_launch(
        "lines_across.cu", "scan_lines_across", "p" * 9 + "iiii" + "l" * 12, constants, 0,
        batch * groups * blocks, 32 * plan.across, u,
        u, delta, A, B, C, D, delta_bias, y, last, channels, channels // groups, length, blocks,
        *u.stride()[:2], *delta.stride()[:2], *B.stride(), *C.stride(),
    )  # fmt: skip
    return y, last


def scan_backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    softplus: bool,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiates `scan`. Arguments and results as of `Backend.scan_1d_backward`."""
    inputs = (u, delta, A, B, C, D, delta_bias)
    batch, channels, length = u.shape
    dy, u, delta, (B, C) = _lines(dy.to(u.dtype)), _lines(u), _lines(delta), _alike(B, C)
    A, D, delta_bias = (t.float().contiguous() for t in (A, D, delta_bias))
    groups, N = B.shape[1:3]
    plan = plan or plan_for(batch, channels, groups, length, N, u.get_device())
    width = _width((dy, u, delta), length)
    segment = segment_length(N, plan.rows)
    segments = -(-length // segment)
    whole = segments == 1

    du = u.new_empty((batch, channels, length))
    ddelta = delta.new_empty((batch, channels, length))
    dA, dD, dbias = (
        u.new_empty(size, dtype=torch.float32)
        for size in ((batch, channels, N), (batch, channels), (batch, segments, channels))
    )
    tail = None
    if not whole:
        per, lanes = spread(N)
        if (length - (segments - 1) * segment) * u.element_size() < 4 * per * lanes + 12:  # no room for its state
            tail = u.new_empty((batch, channels, per * lanes), dtype=torch.float32)
        _walk(
            u,
            delta,
            A,
            B,
            C,
            D,
            delta_bias,
            softplus,
            plan,
            width,
            dy=dy,
            du=du,
            ddelta=ddelta,
            tail=tail,
            dA=dA,
            dD=dD,
        )
    kind = B.dtype if plan.parts == 1 else torch.float32
    dB, dC = (u.new_empty((plan.parts, batch, groups, N, length), dtype=kind) for _ in range(2))
    constants = (
        *_constants(u, delta, B, C, softplus, width, plan), ("WARPS", plan.segment_warps),
        ("RESIDENT", plan.segment_resident), ("WHOLE", int(whole)), ("PARTS", plan.parts), ("V_TYPE", TYPES[kind]),
    )  # fmt: skip
    load_and_launch(
        "lines_backward.cu", "scan_lines_backward", "p" * 16 + "iii" + "l" * 14, constants, 0,
        batch * groups * segments * plan.parts, 32 * plan.segment_warps, u,
        dy, u, delta, A, B, C, D, delta_bias, tail, du, ddelta, dB, dC, dA, dD, dbias,
        channels, channels // groups, length,
        *dy.stride()[:2], *u.stride()[:2], *delta.stride()[:2], *B.stride(), *C.stride(),
    )  # fmt: skip
    dA, dD, dbias = _sum_rows(dA.view(batch, -1), dD, dbias.view(batch * segments, channels))
    if plan.parts > 1:
        dB, dC = _sum_rows(dB.view(plan.parts, -1), dC.view(plan.parts, -1))
    grads = (du, ddelta, dA, dB, dC, dD, dbias)
    return tuple(g.view(t.shape).to(t.dtype) for g, t in zip(grads, inputs, strict=True))  # type: ignore[return-value]


def _walk(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    bias: Tensor,
    softplus: bool,
    plan: Plan,
    width: int,
    **more: Tensor | None,
) -> None:
    """Runs `lines.cu`: forward if `more` has y, else the first kernel of the backward pass."""
    batch, channels, length = u.shape
    groups, N = B.shape[1:3]
    dy = more.get("dy")
    outputs = (more.get(name) for name in ("y", "last", "dy", "du", "ddelta", "tail", "dA", "dD"))
    blocks = -(-channels // groups // (plan.warps * 32 // spread(N)[1]))
    constants = (
        *_constants(u, delta, B, C, softplus, width, plan), ("WARPS", plan.warps),
        ("RESIDENT", plan.resident if dy is None else plan.gradient_resident), ("GRADIENT", int(dy is not None)),
        ("PACKED", int(plan.packed and dy is None and TYPES[B.dtype] > 0)),
    )  # fmt: skip
    load_and_launch(
        "lines.cu", "scan_lines", "p" * 15 + "iiii" + "l" * 14, constants, 0,
        batch * groups * blocks, 32 * plan.warps, u,
        u, delta, A, B, C, D, bias, *outputs, channels, channels // groups, length, blocks,
        *u.stride()[:2], *delta.stride()[:2], *(u if dy is None else dy).stride()[:2], *B.stride(), *C.stride(),
    )  # fmt: skip


def _sum_rows(*matrices: Tensor) -> list[Tensor]:
    """Sums up to three matrices (count, columns) to (columns,), in a fixed order and one launch."""
    outs = [matrix.new_empty(matrix.shape[1]) for matrix in matrices]
    arguments: list[Tensor | int | None] = []
    for matrix, out in zip(matrices, outs, strict=True):
        arguments += [matrix, out, *matrix.shape]
    arguments += [None, None, 0, 0] * (3 - len(matrices))
    blocks = sum(-(-matrix.shape[1] // 32) for matrix in matrices)
    constants = (("X_TYPE", 0), ("P_TYPE", 0), ("Y_TYPE", 0), ("RANK", 1), ("STATES", 1), ("PARTS", 1), ("VEC", 0))
    load_and_launch("sum.cu", "sum_rows", "ppii" * 3, constants, 0, blocks, 256, matrices[0], *arguments)
    return outs


def _constants(
    u: Tensor, delta: Tensor, B: Tensor, C: Tensor, softplus: bool, width: int, plan: Plan
) -> tuple[tuple[str, int], ...]:
    states, length = B.shape[2:]
    adjacent = length == 1 or B.stride(3) == C.stride(3) == 1
    vectors = _width((B, C), length) if adjacent else 1
    return _constants_of(u.dtype, delta.dtype, B.dtype, states, softplus, width, vectors, plan.rows)


@functools.cache
def _constants_of(
    u: torch.dtype,
    delta: torch.dtype,
    vectors: torch.dtype,
    states: int,
    softplus: bool,
    width: int,
    vectors_width: int,
    rows: int,
) -> tuple[tuple[str, int], ...]:
    per, lanes = spread(states)
    return (
        ("X_TYPE", TYPES[u]), ("Y_TYPE", TYPES[delta]), ("P_TYPE", TYPES[vectors]), ("RANK", 1), ("STATES", states),
        ("PER", per), ("LANES", lanes), ("VEC", width), ("P_VEC", vectors_width), ("SOFTPLUS", int(softplus)),
        ("ROWS", rows), ("SEGMENT", segment_length(states, rows)),
    )  # fmt: skip


def _lines(t: Tensor) -> Tensor:
    """Returns (B, C, L) in a dtype of the kernels, copied only if its lines are in pieces."""
    if t.dtype not in TYPES:
        t = t.float()
    adjacent = t.stride(2) == 1 or t.shape[2] == 1
    return t if adjacent and t.shape[1] * t.stride(1) * t.element_size() < OFFSETS else t.contiguous()


def _alike(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Returns B and C in the same dtype, one of the kernels."""
    if B.dtype == C.dtype and B.dtype in TYPES:
        return B, C
    return B.float(), C.float()


def _width(tensors: tuple[Tensor, ...], length: int) -> int:
    """Returns how many tokens of lines can be read at a time."""
    for width in (8, 4, 2):
        if length % width == 0 and all(_aligned(t, width) for t in tensors):
            return width
    return 1


def _aligned(t: Tensor, width: int) -> bool:
    size = t.element_size()
    unit = min(16, width * size)
    return t.data_ptr() % unit == 0 and all(
        count == 1 or step * size % unit == 0 for count, step in zip(t.shape[:-1], t.stride()[:-1], strict=True)
    )
