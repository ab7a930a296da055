"""Training kernels of the convolution branch, as one differentiable function; see `cuda/batch.cu`.

Batch norms with their ReLUs run on kernels of this package, convolutions on PyTorch's. The output of a batch norm is
recomputed in the backward pass from its input instead of saved. A bias before a batch norm only shifts the running
mean, so it is added there alone, and its gradient is zero.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.autograd.graph import increment_version

from ..cuda import nvrtc
from ..once import once
from . import eligibility, training
from .derivatives import differentiable_once
from .memory import parameter, processors, ready, types
from .registry import replaces
from .training import sum_programs

SIGNATURES = {  # of the kernels; see `nvrtc.Kernel`
    "batch_sums": "ppl",
    "batch_stats": "pppppppppilff",
    "batch_apply": "ppppl",
    "relu_gradient": "ppppl",
    "batch_gradient_sums": "ppppl",
    "batch_gradient": "pppppl",
}
ROWS_EACH = 4  # rows that a thread sums, at least
PROGRAMS = 4  # per multiprocessor


class Norm(NamedTuple):
    """State of a batch norm besides its parameters."""

    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float | None
    eps: float
    tracked: Tensor | None  # the number of batches


@replaces("conv_branch", eligibility.fits_conv_branch)
def conv_branch(x: Tensor, branch: nn.Sequential) -> Tensor:
    norms, parameters = branch_parts(branch)
    return ConvBranch.apply(x, norms, *parameters)


def branch_parts(branch: nn.Sequential) -> tuple[list[Norm], list[nn.Parameter]]:
    """Returns the batch norms and the parameters of a convolution branch as `ConvBranch` takes them."""
    parameters: list[Any] = []
    norms = []
    for layer in branch._modules.values():  # quicker than through the attributes of modules
        if not isinstance(layer, nn.ReLU):
            parameters += (eligibility.own_parameter(layer, name) for name in ("weight", "bias"))
        if isinstance(layer, nn.BatchNorm2d):
            mean, var, tracked = (layer._buffers[n] for n in ("running_mean", "running_var", "num_batches_tracked"))
            norms.append(Norm(mean, var, layer.momentum, layer.eps, tracked))
    return norms, parameters


class ConvBranch(Function):
    """Computes relu(conv1(relu(bn(conv3(relu(bn(conv3(bn(x)))))))) of x (B, H, W, C), in the same shape.

    Args:
        norms: of the three batch norms, whose running statistics are updated.
        parameters: weight and bias of each layer, in order: norm, conv, norm, conv, norm, conv.
    """

    @staticmethod
    def forward(ctx, x, norms, *parameters):
        x = ready(x)
        ctx.dtypes = [p.dtype for p in parameters]
        # In the layout of the map, which PyTorch would copy to in each convolution.
        kernels = [p.to(x.dtype, memory_format=torch.channels_last) for p in parameters[2::4]]
        w0, b0, c1, w1, b1, c2, w2, b2, c3 = (parameter(p) for i, p in enumerate(parameters) if i % 4 != 2)
        stats = [_stats(x, norms[0], w0, b0, None)]
        first = _convolve(_apply(x, stats[0], relu=False), kernels[0])
        stats.append(_stats(first, norms[1], w1, b1, c1))
        second = _convolve(_apply(first, stats[1], relu=True), kernels[1])
        stats.append(_stats(second, norms[2], w2, b2, c2))
        out = _add_bias_relu(_convolve(_apply(second, stats[2], relu=True), kernels[2]), c3)
        ctx.save_for_backward(x, first, second, out, *stats, *kernels)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, dout):
        x, first, second, out, *rest = ctx.saved_tensors
        stats, kernels, wanted = rest[:3], rest[3:], ctx.needs_input_grad[2:]
        grads: list[Tensor | None] = [None] * 12
        d, sums = _relu_gradient(out, ready(dout))
        grads[11] = sums[0]
        for layer, given in ((2, second), (1, first), (0, x)):
            at, relu = 4 * layer, layer > 0
            d, grads[at + 2] = _convolve_back(d, _apply(given, stats[layer], relu), kernels[layer], wanted[at + 2])
            sums = _gradient_sums(given, d, stats[layer], relu)
            grads[at + 1], grads[at] = sums
            if layer or ctx.needs_input_grad[0]:
                d = _gradient(given, d, stats[layer], sums, relu)
        for at in (3, 7):
            grads[at] = torch.zeros_like(sums[0])
        listed = [
            g.to(t, memory_format=torch.contiguous_format) if g is not None and w else None
            for g, t, w in zip(grads, ctx.dtypes, wanted, strict=True)
        ]
        return d if ctx.needs_input_grad[0] else None, None, *listed


# --- convolutions ---------------------------------------------------------------------------------------------------


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    padding = weight.shape[2] // 2
    return ready(nn.functional.conv2d(x.permute(0, 3, 1, 2), weight, padding=padding).permute(0, 2, 3, 1))


def _convolve_back(d: Tensor, x: Tensor, weight: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    padding = [weight.shape[2] // 2] * 2
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        d.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1,
        [True, wanted, False],
    )  # fmt: skip
    return ready(dx.permute(0, 2, 3, 1)), dweight


# --- batch norms ----------------------------------------------------------------------------------------------------


def _stats(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor, before: Tensor | None) -> Tensor:
    """Returns the statistics (4, C) of this batch; see `cuda/batch.cu`."""
    C, rows, partials = _partials(x)
    plan = batch_plan(C, x.dtype, False, x.get_device())
    training.launch(plan("batch_sums"), len(partials), plan.threads, x, x, partials, rows)
    stats = x.new_empty((4, C), dtype=torch.float32)
    tensors = partials, x, weight, bias, before, norm.running_mean, norm.running_var, stats, norm.tracked
    numbers = len(partials), rows, norm.momentum, norm.eps
    training.launch(plan("batch_stats"), -(-C // 32), 512, x, *tensors, *numbers)
    written(norm)
    return stats


def written(norm: Norm) -> None:
    """Tells PyTorch that the state of a batch norm was written, which it cannot see: what was computed from it is old.

    As PyTorch's batch norm does, this increases the version of the number of batches.
    """
    state = norm.running_mean if norm.tracked is None else norm.tracked
    if state is not None and not state.is_inference():
        increment_version(state)


def _apply(x: Tensor, stats: Tensor, relu: bool) -> Tensor:
    return _scale_and_shift(x, stats[2], stats[3], torch.empty_like(x), relu)


def _add_bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    """Adds the bias and applies ReLU, in place."""
    return _scale_and_shift(x, None, bias, x, True)


def _scale_and_shift(x: Tensor, scale: Tensor | None, shift: Tensor, y: Tensor, relu: bool) -> Tensor:
    plan, fours = batch_plan(x.shape[-1], x.dtype, relu, x.get_device()), x.numel() // 4
    training.launch(plan("batch_apply"), -(-fours // 256), 256, x, x, scale, shift, y, fours)
    return y


def _relu_gradient(y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    C, rows, partials = _partials(y)
    plan, dx = batch_plan(C, y.dtype, True, y.get_device()), torch.empty_like(y)
    training.launch(plan("relu_gradient"), len(partials), plan.threads, y, y, dy, dx, partials, rows)
    return dx, sum_programs(partials)


def _gradient_sums(x: Tensor, dy: Tensor, stats: Tensor, relu: bool) -> Tensor:
    """Returns the gradients of bias and weight, (2, C)."""
    C, rows, partials = _partials(x)
    plan = batch_plan(C, x.dtype, relu, x.get_device())
    kernel = plan("batch_gradient_sums")
    training.launch(kernel, len(partials), plan.threads, x, x, dy, stats, partials, rows)
    return sum_programs(partials)


def _gradient(x: Tensor, dy: Tensor, stats: Tensor, sums: Tensor, relu: bool) -> Tensor:
    plan, fours, dx = batch_plan(x.shape[-1], x.dtype, relu, x.get_device()), x.numel() // 4, torch.empty_like(x)
    kernel = plan("batch_gradient")
    training.launch(kernel, -(-fours // 256), 256, x, x, dy, stats, sums, dx, fours)
    return dx


def _partials(x: Tensor) -> tuple[int, int, Tensor]:
    """Returns channels, rows, and a buffer for the partial sums of each program."""
    C = x.shape[-1]
    rows = x.numel() // C
    return C, rows, x.new_empty((programs_for(rows, C, x.get_device()), 2, C), dtype=torch.float32)


def programs_for(rows: int, C: int, device: int) -> int:
    """Returns the programs that sum over rows of C numbers."""
    return min(-(-rows // (ROWS_EACH * _together(C))), PROGRAMS * processors(device))


def _together(C: int) -> int:
    """Rows that a program takes at a time, with C / 4 threads each."""
    return max(1, 256 // (C // 4))


class BatchPlan(NamedTuple):
    threads: int
    constants: tuple[tuple[str, int], ...]
    device: int

    def __call__(self, name: str) -> Callable[..., None]:
        return _kernel(name, self.constants, self.device)


@functools.cache
def batch_plan(C: int, dtype: torch.dtype, relu: bool, device: int) -> BatchPlan:
    threads = _together(C) * (C // 4)
    return BatchPlan(threads, (*types(dtype), ("CHANNELS", C), ("THREADS", threads), ("RELU", int(relu))), device)


@once
def _kernel(name: str, constants: tuple[tuple[str, int], ...], device: int) -> Callable[..., None]:
    return nvrtc.load_kernel("batch.cu", name, SIGNATURES[name], constants, 0, device)
