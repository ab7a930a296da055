"""Backend "cuda": CUDA kernels for NVIDIA GPUs, compiled at first use by NVRTC, which comes with PyTorch.

`cuda/forward.cu` and `cuda/backward.cu` hold the kernels and describe the design, for one dimension `cuda/lines.cuh`;
`cuda/nvrtc.py` compiles and launches them. Scans that they do not cover (more than 16 states) go to the Triton backend,
or without Triton to plain PyTorch.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..cuda import lines, nvrtc
from ..cuda.nvrtc import TYPES as TYPES
from ..cuda.nvrtc import launch, load_and_launch
from . import eager, triton
from .base import Backend, Gradients1d, Gradients2d

CHUNK = 16  # tokens between saved states; TILE of cuda/common.cuh
PADDED_STATES = 16
MAX_RANK = 64
REGISTERS = 65536  # of a multiprocessor
OFFSETS = 2**32  # bytes within one image, which the kernels count in 32 bits
K = 4
BLOCKS = (128, 96, 64, 32)  # channels per program
FULL = 16  # warps that keep a multiprocessor busy
NARROW = 64  # channels up to which dividing long lines was measured


class Plan(NamedTuple):
    """Parameters of one launch."""

    channels: int  # per program
    lanes: int = 1  # forward: lanes that share a channel, 1, 2 or 4
    segments: int = 1  # forward: parallel pieces of the length; more than one needs a second pass over the tokens
    resident: int = 1  # forward: programs per multiprocessor to compile for
    per_thread: int = 2  # backward: channels per thread
    occupancy: int = 2  # backward: resident programs per multiprocessor


def _too_old(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= (7, 5):
        return None
    return f"needs a GPU of compute capability 7.5, cuda:{device} has {capability[0]}.{capability[1]}"


def scan_parts(
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    states: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Returns the contribution of each direction to y, (B, K, L, C) in the dtype of x. Arguments as in `scan_2d`."""
    B, H, W, C = x.shape
    N = A.shape[2]
    save = states is not None and states.numel() > 0
    x, proj = _map(x), _map(proj)
    plan = plan or forward_plan(B, H * W, C, x.get_device())
    blocks, segments, length = divide(H * W, C, plan)
    out = x.new_empty((B, K, H * W, C))
    ends = x.new_empty((B, K, segments, N, C), dtype=torch.float32) if segments > 1 else None
    sums = x.new_empty((B, K, segments, C), dtype=torch.float32) if segments > 1 else None
    sizes = (H, W, C, blocks, segments, length, *_strides(x), *_strides(proj), proj.stride(3))
    arguments = (x, proj, *_float(dt_weight, dt_bias, A, D), out, states if save else None, ends, sums, *sizes)
    constants = _constants(x, proj, x.dtype, dt_weight, A)
    for kernel in forward_kernels(constants, plan, segments, save, x.get_device()):
        launch(kernel, B * K * segments * blocks, plan.channels * plan.lanes, x, *arguments)
    return out


def divide(length: int, channels: int, plan: Plan) -> tuple[int, int, int]:
    """Returns the programs that share the channels of a line, and the segments of a line and their length in tiles."""
    tiles = -(-length // CHUNK)
    each = -(-tiles // plan.segments)
    return -(-channels // plan.channels), -(-tiles // each), each


def forward_kernels(
    constants: tuple[tuple[str, int], ...], plan: Plan, segments: int, save: bool, device: int
) -> list[nvrtc.Kernel]:
    """Returns the kernels of a forward pass in their order, which take the same arguments."""
    own = ("LANES", plan.lanes), ("THREADS", plan.channels * plan.lanes), ("RESIDENT", plan.resident)
    modes = [(0, 0, int(save))] if segments == 1 else [(1, 0, 0), (0, 1, int(save))]
    flags = [tuple(zip(("ENDS", "CARRY", "SAVE"), mode, strict=True)) for mode in modes]
    signature = "pppppppppp" + "iiiiii" + "lilii"
    return [
        nvrtc.load_kernel("forward.cu", "scan_forward", signature, (*constants, *own, *flag), 0, device)
        for flag in flags
    ]


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums (outer, parts, inner) to (outer, inner) of `dtype`, in float32 and in a fixed order."""
    outer, count, inner = parts.shape
    if count == 1 and parts.dtype == dtype:
        return parts[:, 0]
    out = parts.new_empty((outer, inner), dtype=dtype)
    kernel, grid = parts_kernel(outer, count, inner, parts.dtype, dtype, parts.get_device())
    launch(kernel, grid, 256, parts, parts, out, outer, inner)
    return out


def parts_kernel(
    outer: int, count: int, inner: int, given: torch.dtype, dtype: torch.dtype, device: int
) -> tuple[nvrtc.Kernel, int]:
    """Returns the kernel that sums (outer, count, inner) of a type to (outer, inner) of another, and its programs."""
    step = 4 if inner % 4 == 0 else 1
    types = (("X_TYPE", TYPES[given]), ("P_TYPE", 0), ("Y_TYPE", TYPES[dtype]))
    constants = (*types, ("RANK", 1), ("STATES", 1), ("PARTS", count), ("VEC", int(step == 4)))
    kernel = nvrtc.load_kernel("sum.cu", "sum_parts", "ppll", constants, 0, device)
    return kernel, -(-outer * inner // (256 * step))


def _sum_table(table: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of dt_weight, dt_bias, A and D from their shares per image, (B, K, N + R + 2, C)."""
    B, _, rows, C = table.shape
    states, blocks = rows - rank - 2, -(-C // 32)
    A, weight = table.new_empty((K, C, states)), table.new_empty((K, C, rank))
    bias, D = table.new_empty((K, C)), table.new_empty((K, C))
    load_and_launch(
        "sum.cu", "sum_table", "pppppiii",
        (("X_TYPE", 0), ("P_TYPE", 0), ("Y_TYPE", 0), ("RANK", rank), ("STATES", states), ("PARTS", 1), ("VEC", 0)),
        0, K * rows * blocks, 256, table, table, A, weight, bias, D, B, C, blocks,
    )  # fmt: skip
    return weight, bias, A, D


# --- launches -------------------------------------------------------------------------------------------------------


@functools.cache
def forward_plan(batch: int, length: int, channels: int, device: int) -> Plan:
    """Returns the launch of the forward kernel: small batches first get more lanes per channel, then segments.

    Few but long lines of few channels get one lane per channel and segments enough to fill the GPU. Their second pass
    over the tokens costs less than the lines that a single pass would leave alone on a multiprocessor.
    """
    processors = _properties(device).multi_processor_count
    warps = max(1, batch * K * -(-channels // 32))
    tiles, segments = -(-length // CHUNK), FULL * processors // warps
    if segments >= 8 and tiles >= 7 * segments and channels <= NARROW:
        return Plan(32, 1, segments, resident=FULL)
    lanes = 1
    while lanes < 4 and warps * lanes < 8 * processors:  # two warps per scheduler
        lanes *= 2
    # Small programs spread evenly over the multiprocessors; many channels have programs enough.
    block = _block(channels, BLOCKS) if channels >= 384 and lanes == 1 else 32
    segments = min(12 * processors // (warps * lanes), -(-length // CHUNK) // 2)
    segments = segments if segments >= 3 else 1
    share = -(-batch * K * segments * -(-channels // block) // processors)
    return Plan(block, lanes, segments, resident=max(1, min(share, REGISTERS // (128 * block * lanes))))


@functools.cache
def backward_plan(channels: int, rank: int, size: int, device: int) -> Plan:
    """Returns the launch of the backward kernel for maps with elements of `size` bytes.

    Two programs should share a multiprocessor, whose shared memory is a kilobyte, which each program reserves, more
    than a program may have.
    """
    room = _properties(device).shared_memory_per_block_optin
    fit = [block for block in BLOCKS if backward_shared(rank, Plan(block), size) <= (room - 1024) // 2]
    return Plan(_block(channels, fit or BLOCKS[-1:]))


def backward_shared(rank: int, plan: Plan, size: int) -> int:
    """Returns the size in bytes of `struct Shared` in cuda/backward.cu, for maps with elements of `size` bytes."""
    warps = plan.channels // (8 * plan.per_thread)
    padded = -(-rank // 4) * 4
    row, pitch, states = padded + 2 * PADDED_STATES, plan.channels + 4, 4 * 32 * plan.per_thread * warps
    numbers = (1 + warps) * CHUNK * row + 3 * CHUNK * pitch + 4 * states + 2 * padded * pitch + 16 * CHUNK
    return 4 * numbers + 4 * CHUNK * plan.channels * size


def backward_kernel(
    constants: tuple[tuple[str, int], ...], plan: Plan, rank: int, size: int, channels: int, chunks: bool, device: int
) -> tuple[nvrtc.Kernel, int]:
    """Returns the kernel of a backward pass, for maps with elements of `size` bytes, and the threads of a program."""
    warps = plan.channels // (8 * plan.per_thread)
    own = (
        ("WARPS", warps), ("CPT", plan.per_thread), ("OCCUPANCY", plan.occupancy), ("ALIGNED", int(channels % 4 == 0)),
        ("CHUNKS", int(chunks)),
    )  # fmt: skip
    signature, shared = "ppppppppppp" + "iiiii" + "lilili" + "i", backward_shared(rank, plan, size)
    return nvrtc.load_kernel("backward.cu", "scan_backward", signature, (*constants, *own), shared, device), 32 * warps


def _block(channels: int, blocks: Sequence[int]) -> int:
    """Returns the channels per program that leave the fewest threads idle; of equals, the largest."""
    return min(blocks, key=lambda block: (-(-channels // block) * block, -block))


@functools.cache
def _properties(device: int):
    return torch.cuda.get_device_properties(device)


def _constants(x: Tensor, proj: Tensor, out: torch.dtype, dt_weight: Tensor, A: Tensor) -> tuple[tuple[str, int], ...]:
    R, N = dt_weight.shape[2], A.shape[2]
    steps = (proj.stride(0), proj.stride(1), proj.stride(2), proj.stride(3))
    aligned = proj.data_ptr() % (4 * proj.element_size()) == 0 and all(step % 4 == 0 for step in steps)
    return scan_constants(x.dtype, proj.dtype, out, R, N, aligned)


def scan_constants(
    x: torch.dtype, proj: torch.dtype, out: torch.dtype, rank: int, states: int, aligned: bool
) -> tuple[tuple[str, int], ...]:
    """Returns the constants of the kernels of a scan; `aligned`: whether all tokens of proj lie on four elements."""
    types = ("X_TYPE", TYPES[x]), ("P_TYPE", TYPES[proj]), ("Y_TYPE", TYPES[out])
    quads = rank % 4 == 0 and states == PADDED_STATES and aligned
    return *types, ("RANK", rank), ("STATES", states), ("QUADS", int(quads))


def _map(t: Tensor) -> Tensor:
    """Returns t, copied unless its last dimension is contiguous and its pixels are evenly spaced."""
    regular = t.stride(-1) == 1 or t.shape[-1] == 1
    if t.ndim == 5:
        regular = regular and t.stride(3) > 0
    H, W = t.shape[1:3]
    if regular and (H == 1 or W == 1 or t.stride(1) == W * t.stride(2)) and H * W * _strides(t)[1] * 4 < OFFSETS:
        return t
    return t.contiguous()


def _in_chunks(t: Tensor) -> bool:
    """Returns whether the channels of every pixel can be read 16 bytes at a time."""
    numbers = (t.shape[-1], *_strides(t))
    return t.data_ptr() % 16 == 0 and all(number * t.element_size() % 16 == 0 for number in numbers)


def _strides(t: Tensor) -> tuple[int, int]:
    """Returns the strides between images and between pixels."""
    return t.stride(0), t.stride(2) if t.shape[2] > 1 else t.stride(1)


def _float(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.float().contiguous() for t in tensors)


def new_states(x: Tensor, A: Tensor) -> Tensor:
    """Allocates what the forward pass saves for the backward pass, (B, K, chunks, N, C) in float32."""
    B, H, W, C = x.shape
    return x.new_empty((B, K, -(-H * W // CHUNK), A.shape[2], C), dtype=torch.float32)


def covers(pixels: int, channels: int, size: int, rank: int, states: int) -> bool:
    """Returns whether the kernels scan maps of that many pixels, with numbers of `size` bytes."""
    return pixels * channels * size < OFFSETS and states <= PADDED_STATES and 1 <= rank <= MAX_RANK


def _covered(x: Tensor, dt_weight: Tensor, A: Tensor) -> bool:
    _, H, W, C = x.shape
    return covers(H * W, C, x.element_size(), dt_weight.shape[2], A.shape[2])


def _fallback() -> Backend:
    """Returns the backend for scans that the kernels do not cover."""
    return triton.BACKEND if triton.BACKEND.available() else eager.BACKEND


class CudaBackend(Backend):
    """Runs the CUDA kernels of `kernels/cuda`. `plan` overrides the launch, for tuning."""

    name = "cuda"
    chunk = CHUNK

    def why_not(self) -> str | None:
        if not torch.cuda.is_available():
            return "PyTorch finds no CUDA GPU; check nvidia-smi, and that this PyTorch was built for CUDA"
        if torch.version.hip is not None:
            return "these kernels are for NVIDIA GPUs; AMD GPUs have the backend 'triton'"
        try:
            nvrtc.compiler(), nvrtc.driver()
        except OSError as error:
            return str(error)
        reasons = [_too_old(device) for device in range(torch.cuda.device_count())]
        return reasons[0] if reasons and all(reasons) else None

    def why_not_on(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype not in TYPES:
            return f"the CUDA kernels compute in float32 and take no {dtype}; use backend 'torch'"
        if device.type != "cuda":
            return f"the CUDA kernels run on GPUs, the tensors are on {device.type}"
        return _too_old(device.index if device.index is not None else torch.cuda.current_device())

    def scan_2d(
        self,
        x: Tensor,
        proj: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        states: Tensor,
        plan: Plan | None = None,
    ) -> Tensor:
        if not _covered(x, dt_weight, A):
            return _fallback().scan_2d(x, proj, dt_weight, dt_bias, A, D, states)
        with torch.cuda.device_of(x):
            parts = scan_parts(x, proj, dt_weight, dt_bias, A, D, states, plan)
            return sum_parts(parts.flatten(2), x.dtype).view(x.shape)

    def scan_2d_backward(
        self,
        dy: Tensor,
        x: Tensor,
        proj: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        states: Tensor,
        plan: Plan | None = None,
    ) -> Gradients2d:
        if not _covered(x, dt_weight, A):
            return _fallback().scan_2d_backward(dy, x, proj, dt_weight, dt_bias, A, D, states)
        B, H, W, C = x.shape
        R, N, P = dt_weight.shape[2], A.shape[2], proj.shape[4]
        dy, x, proj = _map(dy), _map(x), _map(proj)
        plan = plan or backward_plan(C, R, x.element_size(), x.get_device())
        blocks = -(-C // plan.channels)
        dxs = x.new_empty((B, K, H * W, C))
        dproj = proj.new_empty((blocks, B, H, W, K, P), dtype=torch.float32 if blocks > 1 else proj.dtype)
        dtable = x.new_empty((B, K, N + R + 2, C), dtype=torch.float32)
        constants = _constants(x, proj, dproj.dtype, dt_weight, A)
        chunks = _in_chunks(x) and _in_chunks(dy)
        kernel, threads = backward_kernel(constants, plan, R, x.element_size(), C, chunks, x.get_device())
        with torch.cuda.device_of(x):
            launch(
                kernel, B * K * blocks, threads, x,
                dy, x, proj, *_float(dt_weight, dt_bias, A, D), states, dxs, dproj, dtable, B, H, W, C, blocks,
                *_strides(dy), *_strides(x), *_strides(proj), proj.stride(3),
            )  # fmt: skip
            dx = sum_parts(dxs.flatten(2), x.dtype).view(x.shape)
            dproj = sum_parts(dproj.view(1, blocks, -1), proj.dtype).view(proj.shape)
            parameters = _sum_table(dtable, R)
        inputs = (dt_weight, dt_bias, A, D)
        return dx, dproj, *(g.to(t.dtype) for g, t in zip(parameters, inputs, strict=True))  # type: ignore[return-value]

    def scan_1d(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        delta_bias: Tensor,
        softplus: bool,
        plan: lines.Plan | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not lines.covers(u.shape[1], u.shape[2], A.shape[1]):
            return _fallback().scan_1d(u, delta, A, B, C, D, delta_bias, softplus)
        with torch.cuda.device_of(u):
            return lines.scan(u, delta, A, B, C, D, delta_bias, softplus, plan)

    def scan_1d_backward(
        self,
        dy: Tensor,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        delta_bias: Tensor,
        softplus: bool,
        plan: lines.Plan | None = None,
    ) -> Gradients1d:
        if not lines.covers(u.shape[1], u.shape[2], A.shape[1]):
            return _fallback().scan_1d_backward(dy, u, delta, A, B, C, D, delta_bias, softplus)
        with torch.cuda.device_of(u):
            return lines.scan_backward(dy, u, delta, A, B, C, D, delta_bias, softplus, plan)


BACKEND = CudaBackend()
