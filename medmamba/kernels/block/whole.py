"""A whole SS-Conv-SSM block in training as one differentiable function.

The kernels are those of the pieces (`training.py`, `training_conv.py`, the scan), and products and 3x3 convolutions are
PyTorch's. But all of a block is launched from here, after a plan that is made once (`plan.py`), on addresses rather
than tensors: what bounds training without a CUDA graph is the time that Python takes per launch, per tensor and per
node of autograd. One kernel brings all parameters into the types and layouts that the others read, and one computes all
their gradients from sums and products, instead of some thirty copies and sums. In a graph the convolutions run beside
the scan.
"""

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors as cut
from torch.autograd.function import Function

from ..cuda import graph_capture, nvrtc
from . import eligibility
from .autocast import in_its_types
from .derivatives import differentiable_once
from .memory import ready
from .plan import SCALE, SHIFT, SPATIAL, Key, Plan, plan_for
from .registry import replaces
from .training import ALL_PIXELS
from .training_conv import Norm, branch_parts, written
from .whole_backward import backward

NORMS = ((13, 14), (17, 18), (21, 22))  # weight and bias among the parameters of `Block`
FLOATS = (0, 1, 3, 4, 7, 9, 10, 11, 13, 14, 16, 17, 18, 20, 21, 22, 24)  # read as float32; others by `prepare_block`


@replaces("run_block", eligibility.fits_block)
def run_block(x: Tensor, block: Any) -> Tensor:
    modules = block._modules  # quicker than through the attributes of modules
    ssm, norm = modules["ssm"], modules["norm"]
    layers = ssm._modules
    norms, branch = branch_parts(modules["conv"])
    affine = "weight", "bias"
    parameters = (
        *_own(norm, *affine), *_own(layers["in_proj"], "weight"), *_own(layers["conv"], *affine),
        *_own(ssm, "x_proj", "dt_weight", "dt_bias", "A_log", "D"), *_own(layers["out_norm"], *affine),
        *_own(layers["out_proj"], "weight"), *branch,
    )  # fmt: skip
    settings = _Settings(norm.eps, layers["out_norm"].eps, norms)
    with _on_its_device(x):
        return Block.apply(x, modules["drop_path"].keep_mask(x), settings, *parameters)


def _own(module: Any, *names: str) -> list[Any]:
    return [eligibility.own_parameter(module, name) for name in names]


class _Settings(NamedTuple):
    eps: float
    out_eps: float
    norms: list[Norm]


def _on_its_device(x: Tensor) -> contextlib.AbstractContextManager:
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


class Block(Function):
    """Computes `SSConvSSM` of x (B, H, W, 2C); `keep` (B, 1, 1, 1) scales the scan branch of each image, or None.

    Parameters: weight and bias of the norm, in_proj, weight and bias of the depthwise convolution, x_proj, dt_weight,
    dt_bias, A_log, D, weight and bias of the gated norm, out_proj; then those of the branch as `branch_parts` lists
    them. Below, maps are (B, H, W, channels) in memory, whatever the shapes of the tensors that hold them.
    """

    @staticmethod
    @in_its_types
    def forward(ctx, x, keep, settings, *parameters):
        x, wanted = ready(x), ctx.needs_input_grad[3:]
        kinds = [p.dtype for p in parameters]
        # Of several types, none is read, or its gradient rounded, in a narrower one than its own.
        kind = kinds[5] if kinds.count(kinds[5]) == len(kinds) else torch.float32
        own, last = _readable(parameters, kinds, kind)
        rank, states = parameters[6].shape[2], parameters[8].shape[2]
        params = any(wanted[:2]), any(wanted[3:5]), any(wanted[10:12])
        key = Key(
            tuple(x.shape), own[9].shape[1], rank, states, x.dtype, kind, last, keep is not None,
            any(ctx.needs_input_grad), params, x.get_device(),
        )  # fmt: skip
        plan, stream, size = plan_for(key), nvrtc.current_stream(key.device), x.element_size()
        C, half, rows = key.channels, plan.half, plan.rows

        weights, numbers = x.new_empty(plan.weights), x.new_empty(plan.numbers, dtype=torch.float32)
        A = numbers.data_ptr()
        steps, stats = A + 4 * plan.rates, A + 4 * (plan.rates + plan.steps)
        plan.prepare(stream, *(own[i].data_ptr() for i in (5, 15, 19, 2, 12, 23, 8, 6)), weights.data_ptr(), A)
        matrices = codes, *spatial, matrix, out_matrix, point = _matrices(plan, weights, own)

        halves = x.new_empty((3, rows, half))  # the left one, the right one and its norm
        left = halves.data_ptr()
        right, normed = left + rows * half * size, left + 2 * rows * half * size
        plan.split(
            stream, x.data_ptr(), 0, own[0].data_ptr(), own[1].data_ptr(), normed, left, right if key.save else 0, rows,
            0, *ALL_PIXELS, settings.eps,
        )  # fmt: skip

        def branch() -> list[Tensor]:
            return _branch(plan, key, x, left, settings.norms, own, stats, [*spatial, point])

        convolved = graph_capture.run_beside(x, branch)
        wide, scanned = torch.mm(halves[2], matrix.t()), x.new_empty((rows, C))
        gate = wide.data_ptr() + C * size
        given = wide.data_ptr(), own[3].data_ptr(), own[4].data_ptr(), scanned.data_ptr()
        plan.conv(stream, *given, *plan.conv_sizes)
        proj = torch.mm(scanned, codes.t())
        saved = x.new_empty(plan.states if key.save else 0, dtype=torch.float32)
        y = _scan(plan, key, scanned, proj, (steps, own[7].data_ptr(), A, own[9].data_ptr()), saved, stream)
        gated = x.new_empty((rows, C))
        at = y.data_ptr(), gate, own[10].data_ptr(), own[11].data_ptr(), gated.data_ptr(), 0, 0
        plan.gate(stream, *at, rows, 2 * C, *ALL_PIXELS, settings.out_eps)
        scan, out = torch.mm(gated, out_matrix.t()), torch.empty_like(x)
        first, second, third = convolved()
        factors = 0 if keep is None else keep.data_ptr()
        plan.mix(stream, x.data_ptr(), third.data_ptr(), scan.data_ptr(), factors, out.data_ptr(), *plan.mixed)
        if key.save:
            ctx.plan, ctx.key, ctx.settings, ctx.kinds = plan, key, settings, kinds
            read = [own[i] for i in (0, 3, 4, 7, 9, 10, 11)]
            ctx.save_for_backward(
                keep, halves, wide, scanned, proj, saved, y, first, second, third, numbers, *read, *matrices
            )
        return out

    @staticmethod
    @differentiable_once
    @in_its_types
    def backward(ctx, dout):
        with _on_its_device(dout):
            return backward(ctx, ready(dout))


# --- the forward pass -----------------------------------------------------------------------------------------------


def _readable(parameters: tuple[Tensor, ...], kinds: list[torch.dtype], kind: torch.dtype) -> tuple[list[Tensor], bool]:
    """Returns the parameters as kernels read them, and whether the 3x3 kernels lie channels-last."""
    own = list(parameters)
    if all(p.is_contiguous() and not p.data_ptr() % 16 for p in parameters):
        last = False
        if kind == torch.float32 and kinds.count(kind) == len(kinds):
            return own, last
    else:
        spatial = [own[i] for i in SPATIAL]
        last = all(not p.is_contiguous() and p.is_contiguous(memory_format=torch.channels_last) for p in spatial)
    for i, p in enumerate(own):
        form = torch.channels_last if last and i in SPATIAL else torch.contiguous_format
        p = p.to(torch.float32 if i in FLOATS else kind)
        whole = p.is_contiguous(memory_format=form) and not p.data_ptr() % 16
        own[i] = p if whole else p.clone(memory_format=form)
    return own, last


def _matrices(plan: Plan, weights: Tensor, own: Any) -> list[Tensor]:
    """Returns x_proj, the kernels of the branch (out, 3, 3, in), in_proj, out_proj and the 1x1 kernel."""
    found = list(cut(weights, plan.matrices))
    return found if plan.cast else [*found, own[2], own[12], own[23].view(plan.half, plan.half)]


def _branch(plan: Plan, key: Key, x: Tensor, given: int, norms: list, own: list, stats: int, kernels: list) -> list:
    """Runs the convolution branch on the map at the address `given`; returns the outputs of its convolutions."""
    half, rows, (B, H, W, _) = plan.half, plan.rows, key.shape
    stream, eps = nvrtc.current_stream(key.device), [norm.eps for norm in norms]
    applied, partials = x.new_empty((B, H, W, half)), x.new_empty(plan.programs * 2 * half, dtype=torch.float32)
    image, sums, to, outputs = applied.permute(0, 3, 1, 2), partials.data_ptr(), applied.data_ptr(), []
    for i, (norm, (weight, bias)) in enumerate(zip(norms, NORMS, strict=True)):
        before = own[16 + 4 * (i - 1)].data_ptr() if i else 0
        tracked = 0 if norm.tracked is None else norm.tracked.data_ptr()
        plan.batch_sums(stream, given, sums, rows)
        plan.batch_stats(
            stream, sums, given, own[weight].data_ptr(), own[bias].data_ptr(), before, norm.running_mean.data_ptr(),
            norm.running_var.data_ptr(), stats, tracked, plan.programs, rows, norm.momentum, eps[i],
        )  # fmt: skip
        plan.batch_apply[i](stream, given, stats + 4 * SCALE * half, stats + 4 * SHIFT * half, to, plan.fours)
        written(norm)
        outputs.append(_convolve(plan, applied, image, kernels[i]))
        given, stats = outputs[-1].data_ptr(), stats + 4 * 4 * half
    plan.batch_apply[2](stream, given, 0, own[24].data_ptr(), given, plan.fours)  # adds the bias, with ReLU, in place
    return outputs


def _convolve(plan: Plan, applied: Tensor, image: Tensor, kernel: Tensor) -> Tensor:
    if kernel.ndim == 4:
        kernel, padding = kernel.permute(0, 3, 1, 2), 1
    elif plan.products:
        return torch.mm(applied.view(plan.rows, plan.half), kernel.t())
    else:
        kernel, padding = kernel.view(plan.half, plan.half, 1, 1), 0
    return ready(torch.conv2d(image, kernel, padding=padding).permute(0, 2, 3, 1))


def _scan(plan: Plan, key: Key, x: Tensor, proj: Tensor, parameters: tuple, states: Tensor, stream: int) -> Tensor:
    """Returns the sum over directions of the scan, (rows, C), and fills the states."""
    B, C, N, segments = key.shape[0], key.channels, key.states, plan.segments
    parts, y = x.new_empty((4, *x.shape)), torch.empty_like(x)
    room = x.new_empty(B * 4 * segments * (N + 1) * C, dtype=torch.float32) if segments > 1 else None
    ends = 0 if room is None else room.data_ptr()
    sums = ends + 4 * B * 4 * segments * N * C if ends else 0
    at = states.data_ptr() if key.save else 0
    for run in plan.scan:
        run(stream, x.data_ptr(), proj.data_ptr(), *parameters, parts.data_ptr(), at, ends, sums, *plan.scan_sizes)
    plan.sum_directions(stream, parts.data_ptr(), y.data_ptr(), B, plan.pixels * C)
    return y
