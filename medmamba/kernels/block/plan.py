"""The kernels that run a block in training and the sizes of what they read and write, found once per shape and type of
map; see `whole.py`. Finding them anew in each step would take longer than launching them."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import cuda as cuda_backend
from ..backends.cuda import TYPES, K
from ..cuda import nvrtc
from . import training, training_conv
from .training import GATE, SPLIT, WARPS

Kernel = Callable[..., None]
SCALE, SHIFT = 2, 3  # rows of the statistics of a batch; see `cuda/batch.cu`
SPATIAL, POINT = (15, 19), 23  # the kernels of the convolutions among the parameters of `Block` in `whole.py`


class Key(NamedTuple):
    """What the plan of a block depends on."""

    shape: tuple[int, int, int, int]  # of the map: B, H, W and twice `half`
    channels: int  # of the scan
    rank: int
    states: int
    dtype: torch.dtype  # of the map
    kind: torch.dtype  # of the parameters
    last: bool  # whether the kernels of the 3x3 convolutions lie channels-last
    scaled: bool  # whether the scan branch of each image has a factor
    save: bool  # whether a backward pass follows
    params: tuple[bool, bool, bool]  # whether gradients of the block norm, depthwise layer and gated norm are wanted
    device: int


class Run(NamedTuple):
    """A kernel and its numbers of programs and threads."""

    kernel: Kernel
    grid: int
    threads: int

    def __call__(self, stream: int, *arguments) -> None:
        """Launches it. Tensors are passed by address, which a kernel that is still to run must find in use."""
        self.kernel(self.grid, self.threads, stream, *arguments)


@functools.lru_cache(1024)
def plan_for(key: Key) -> "Plan":
    return Plan(key)


class Plan:
    """Kernels by name, each a `Run`, and sizes."""

    def __init__(self, key: Key):
        B, H, W, dim = key.shape
        dtype, device = key.dtype, key.device
        half, pixels, padded = dim // 2, H * W, key.rank + -key.rank % 4
        self.half, self.pixels, self.rows, self.padded = half, pixels, B * pixels, padded
        self.cast = dtype != key.kind
        self.products = dtype != torch.float32  # 1x1 convolutions as such; in float32 cuDNN may use TF32, as PyTorch's
        self._around(key)
        self._branch(dtype, device)
        self._scan(key)
        self._parameters(key)

    # --- operations around the scan ---

    def _around(self, key: Key) -> None:
        (B, H, W, _), C, dtype, device = key.shape, key.channels, key.dtype, key.device
        norm, depthwise, gate = key.params

        def of_norm(name: str, op: int, channels: int, params: bool) -> Run:
            kernel, together = training.norm_kernel(name, op, channels, params, dtype, device)
            backward = name == "norm_backward"
            grid = training.norm_programs(self.rows, together, device) if backward else -(-self.rows // together)
            return Run(kernel, grid, 32 * WARPS)

        def of_conv(name: str, params: bool) -> tuple[Run, tuple[int, ...]]:
            plan = training.conv_plan(name, C, params, dtype, device)
            programs, sizes = plan.share((B, H, W, C))
            return Run(plan.kernel, programs * plan.blocks, plan.threads), (programs, *sizes)

        def of_mix(name: str) -> Run:
            threads = self.rows * self.half // 4
            return Run(training.mix_kernel(name, key.scaled, dtype, device), -(-threads // 256), 256)

        self.split, self.gate = (
            of_norm("norm_forward", SPLIT, self.half, False),
            of_norm("norm_forward", GATE, C, False),
        )
        self.conv, (_, *self.conv_sizes) = of_conv("conv_forward", False)
        self.mix, self.mixed = of_mix("mix_forward"), (self.rows * self.half // 4, pixels_each(key))
        if not key.save:
            return
        self.split_back = of_norm("norm_backward", SPLIT, self.half, norm)
        self.gate_back = of_norm("norm_backward", GATE, C, gate)
        self.conv_back, (self.conv_programs, *self.conv_back_sizes) = of_conv("conv_backward", depthwise)
        self.conv_input, (_, *self.conv_input_sizes) = of_conv("conv_input", False)
        self.mix_back = of_mix("mix_backward")

    # --- the convolution branch ---

    def _branch(self, dtype: torch.dtype, device: int) -> None:
        half, rows = self.half, self.rows
        plain, relu = (training_conv.batch_plan(half, dtype, relu, device) for relu in (False, True))
        self.fours, self.programs = rows * half // 4, training_conv.programs_for(rows, half, device)

        def each(name: str, grid: int, threads: int) -> list[Run]:
            return [Run(plan(name), grid, threads) for plan in (plain, relu, relu)]  # no ReLU after the first norm

        columns = -(-half // 32)
        self.batch_sums = Run(plain("batch_sums"), self.programs, plain.threads)
        self.batch_stats = Run(plain("batch_stats"), columns, 512)
        self.batch_apply = each("batch_apply", -(-self.fours // 256), 256)
        self.batch_gradient_sums = each("batch_gradient_sums", self.programs, plain.threads)
        self.batch_gradient = each("batch_gradient", -(-self.fours // 256), 256)
        self.relu_gradient = Run(relu("relu_gradient"), self.programs, relu.threads)
        self.add_partials = Run(training.sum_kernel(half, device), columns, 512)

    # --- the scan ---

    def _scan(self, key: Key) -> None:
        (B, H, W, _), C, N, dtype, device = key.shape, key.channels, key.states, key.dtype, key.device
        P, pixels, size = self.padded + 2 * N, self.pixels, dtype.itemsize
        constants = functools.partial(cuda_backend.scan_constants, dtype, dtype)
        aligned = P % 4 == 0
        strides = pixels * C, C, pixels * K * P, K * P, P  # of x and proj
        plan = cuda_backend.forward_plan(B, pixels, C, device)
        blocks, self.segments, length = cuda_backend.divide(pixels, C, plan)
        made = constants(dtype, self.padded, N, aligned)
        kernels = cuda_backend.forward_kernels(made, plan, self.segments, key.save, device)
        grid = B * K * self.segments * blocks
        self.scan = [Run(kernel, grid, plan.channels * plan.lanes) for kernel in kernels]
        self.scan_sizes = H, W, C, blocks, self.segments, length, *strides
        self.states = (B, K, -(-pixels // cuda_backend.CHUNK), N, C)

        def parts(outer: int, count: int, inner: int, given: torch.dtype) -> Run:
            return Run(*cuda_backend.parts_kernel(outer, count, inner, given, dtype, device), 256)

        self.sum_directions = parts(B, K, pixels * C, dtype)
        if not key.save:
            return
        plan = cuda_backend.backward_plan(C, self.padded, size, device)
        self.blocks = -(-C // plan.channels)
        self.proj_type = torch.float32 if self.blocks > 1 else dtype
        made = constants(self.proj_type, self.padded, N, aligned)
        chunks = C * size % 16 == 0
        kernel, threads = cuda_backend.backward_kernel(made, plan, self.padded, size, C, chunks, device)
        self.scan_back = Run(kernel, B * K * self.blocks, threads)
        self.scan_back_sizes = B, H, W, C, self.blocks, pixels * C, C, *strides
        self.sum_blocks = parts(1, self.blocks, self.rows * K * P, self.proj_type) if self.blocks > 1 else None

    # --- parameters ---

    def _parameters(self, key: Key) -> None:
        B, C, R, N, half, padded = key.shape[0], key.channels, key.rank, key.states, self.half, self.padded
        spatial = [(half, 3, 3, half)] * 2
        others = [(2 * C, half), (half, C), (half, half)] if self.cast else []
        self.matrices = likes((K * (padded + 2 * N), C), *spatial, *others)
        self.weights = sum(t.numel() for t in self.matrices)
        self.rates, self.steps, stats = K * C * N, K * C * padded, 3 * 4 * half
        self.numbers = self.rates + self.steps + stats
        threads = -(-(self.weights + self.rates + self.steps) // 4)
        self.prepare = Run(whole_kernel("prepare_block", key), -(-threads // 256), 256)
        if not key.save:
            return
        rows = N + padded + 2
        # Numbers in float32 for sums: the scan's per image, those of each program, and the batch norms'.
        table, sums = B * K * rows * C, 3 * 2 * half
        norm, depthwise, gate, branch = (
            self.split_back.grid * 2 * half, self.conv_programs * 10 * C, self.gate_back.grid * 2 * C,
            self.programs * 2 * half,
        )  # fmt: skip
        self.room = [table, norm, depthwise, gate, branch, branch, sums]
        norms, kernel = [(half,), (half,)], (half, 3, 3, half) if key.last else (half, half, 3, 3)
        cast = self.cast
        self.order = [  # of the gradients: shape, or None where they are not among those of `finish`
            *norms, (2 * C, half) if cast else None, (C, 1, 3, 3), (C,), (K, R + 2 * N, C), (K, C, R), (K, C),
            (K, C, N), (K, C), (C,), (C,), (half, C) if cast else None, *norms, kernel, (half,), *norms, kernel,
            (half,), *norms, (half, half, 1, 1) if cast else None, (half,),
        ]  # fmt: skip
        self.gradients = likes(*(shape for shape in self.order if shape))
        columns, groups = (lambda n: -(-n // 32)), -(-C // 32)
        matrices = [K * (R + 2 * N) * C, 9 * half * half, 9 * half * half]
        matrices += [2 * C * half, C * half, half * half] if cast else []
        grid = columns(2 * half) + columns(10 * C) + columns(2 * C) + columns(half) + K * rows * groups + 3
        self.finish = Run(whole_kernel("finish_block", key), grid + sum(-(-n // 1024) for n in matrices), 256)
        self.sizes = B, self.split_back.grid, self.conv_programs, self.gate_back.grid, self.programs


def pixels_each(key: Key) -> int:
    """Returns the threads per image of the kernels that mix channels."""
    _, H, W, dim = key.shape
    return H * W * dim // 8


def likes(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Returns a tensor of each shape, without memory for its numbers."""
    return [torch.empty(1, device="cpu").expand(shape) for shape in shapes]


def whole_kernel(name: str, key: Key) -> Kernel:
    signature = {"prepare_block": 10 * "p", "finish_block": 14 * "p" + 5 * "i"}[name]
    constants = (
        ("X_TYPE", TYPES[key.dtype]), ("P_TYPE", TYPES[key.kind]), ("Y_TYPE", TYPES[key.dtype]), ("RANK", key.rank),
        ("STATES", key.states), ("CHANNELS", key.channels), ("HALF", key.shape[3] // 2), ("LAST", int(key.last)),
    )  # fmt: skip
    return nvrtc.load_kernel("whole.cu", name, signature, constants, 0, key.device)
