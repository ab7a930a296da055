"""The backward pass of a whole block in training; see `whole.py`."""

from typing import Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors as cut

from ..cuda import graph_capture, nvrtc
from .memory import ready
from .plan import POINT, SCALE, SHIFT, SPATIAL, Key, Plan
from .training import ALL_PIXELS


def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    """Computes the gradients of all arguments of `Block` in `whole.py`, whose context this is."""
    plan, key, settings, wanted = ctx.plan, ctx.key, ctx.settings, ctx.needs_input_grad[3:]
    keep, *saved = ctx.saved_tensors  # once, as checkpointing demands
    # Hooks of saved tensors may bring them back elsewhere.
    halves, wide, scanned, proj, states, y, *branch, numbers = map(ready, saved[:10])
    norm_w, conv_w, conv_b, dt_bias, D, gate_w, gate_b = map(ready, saved[10:17])
    codes, *spatial, matrix, out_matrix, point = saved[17:]
    scanned = scanned.clone() if scanned.data_ptr() % 16 else scanned  # read 16 bytes at a time
    stream, size, half, rows, C = (
        nvrtc.current_stream(key.device),
        dout.element_size(),
        plan.half,
        plan.rows,
        key.channels,
    )
    B, H, W, _ = key.shape
    A = numbers.data_ptr()
    steps, stats = A + 4 * plan.rates, A + 4 * (plan.rates + plan.steps)
    room = dout.new_empty(sum(plan.room), dtype=torch.float32)
    at, places = room.data_ptr(), []
    for count in plan.room:
        places.append(at)
        at += 4 * count
    table, norm_sums, depthwise_sums, gate_sums, bias_sums, branch_sums, batch_sums = places

    dconvolved, dscan = dout.new_empty((rows, half)), dout.new_empty((rows, half))  # the gradients of both branches
    factors = 0 if keep is None else keep.data_ptr()
    plan.mix_back(stream, dout.data_ptr(), factors, dconvolved.data_ptr(), dscan.data_ptr(), *plan.mixed)
    beside = graph_capture.run_beside(
        dout,
        lambda: _branch_back(
            plan,
            key,
            dconvolved,
            halves.data_ptr(),
            branch,
            stats,
            [*spatial, point],
            wanted,
            bias_sums,
            branch_sums,
            batch_sums,
        ),
    )
    # One buffer holds the gated map, then the gradient of y, then that before the depthwise layer's activation; another
    # the gradient of the gated map, then that of x.
    gate = wide.data_ptr() + C * size
    first = dout.new_empty((rows, C))
    norms = gate_w.data_ptr(), gate_b.data_ptr()
    dout_proj = None
    if wanted[12]:
        plan.gate(
            stream, y.data_ptr(), gate, *norms, first.data_ptr(), 0, 0, rows, 2 * C, *ALL_PIXELS, settings.out_eps
        )
        dout_proj = torch.mm(dscan.t(), first)
    second, dgate = torch.mm(dscan, out_matrix), dout.new_empty((rows, C))
    del dscan  # maps are freed as soon as they have been read, since autograd frees nothing within a function
    plan.gate_back(
        stream, second.data_ptr(), y.data_ptr(), gate, *norms, 0, 0, first.data_ptr(), dgate.data_ptr(), gate_sums,
        rows, 2 * C, *ALL_PIXELS, settings.out_eps,
    )  # fmt: skip
    dproj = _scan_back(
        plan, key, first, scanned, proj, (steps, dt_bias.data_ptr(), A, D.data_ptr()), states, second, table
    )
    dcodes = torch.mm(dproj.t(), scanned) if wanted[5] else None
    second.addmm_(dproj, codes)
    del dproj
    given = second.data_ptr(), wide.data_ptr(), conv_w.data_ptr(), conv_b.data_ptr(), first.data_ptr(), depthwise_sums
    plan.conv_back(stream, *given, *plan.conv_back_sizes)
    dwide = torch.empty_like(wide)
    wide_given = first.data_ptr(), dgate.data_ptr(), conv_w.data_ptr(), dwide.data_ptr()
    plan.conv_input(stream, *wide_given, *plan.conv_input_sizes)
    del first, second, dgate
    din_proj = torch.mm(dwide.t(), halves[2]) if wanted[2] else None
    dnormed = torch.mm(dwide, matrix)
    dleft, dspatial, dpoint = beside()
    dx, right = torch.empty_like(dout), halves.data_ptr() + rows * half * size
    plan.split_back(
        stream, dnormed.data_ptr(), right, 0, norm_w.data_ptr(), 0, dleft.data_ptr(), dout.data_ptr(), dx.data_ptr(), 0,
        norm_sums, rows, 0, *ALL_PIXELS, settings.eps,
    )  # fmt: skip
    norm, depthwise, gated = key.params
    sums = norm_sums if norm else 0, depthwise_sums if depthwise else 0, gate_sums if gated else 0
    products = dcodes, *dspatial, din_proj, dout_proj, dpoint
    flat = dout.new_empty(sum(t.numel() for t in plan.gradients), dtype=key.kind)
    plan.finish(
        stream, table, A, *sums, batch_sums, bias_sums, *(0 if t is None else t.data_ptr() for t in products),
        flat.data_ptr(), *plan.sizes,
    )  # fmt: skip
    return dx, None, None, *_listed(ctx, flat, (din_proj, dout_proj, dpoint))


def _scan_back(
    plan: Plan,
    key: Key,
    dy: Tensor,
    x: Tensor,
    proj: Tensor,
    parameters: tuple[int, ...],
    states: Tensor,
    dx: Tensor,
    table: int,
) -> Tensor:
    """Fills dx (rows, C) and the table of gradients of the scan's parameters; returns the gradient of proj."""
    dxs = x.new_empty((4, *x.shape))
    parts = x.new_empty((plan.blocks, *proj.shape), dtype=plan.proj_type)
    stream = nvrtc.current_stream(key.device)
    given = dy.data_ptr(), x.data_ptr(), proj.data_ptr(), *parameters, states.data_ptr()
    plan.scan_back(stream, *given, dxs.data_ptr(), parts.data_ptr(), table, *plan.scan_back_sizes)
    plan.sum_directions(stream, dxs.data_ptr(), dx.data_ptr(), key.shape[0], plan.pixels * key.channels)
    if plan.sum_blocks is None:
        return parts[0]
    dproj = torch.empty_like(proj)
    plan.sum_blocks(stream, parts.data_ptr(), dproj.data_ptr(), 1, proj.numel())
    return dproj


def _branch_back(
    plan: Plan,
    key: Key,
    dout: Tensor,
    left: int,
    outputs: list[Tensor],
    stats: int,
    kernels: list[Tensor],
    wanted: tuple[bool, ...],
    bias_sums: int,
    partials: int,
    sums: int,
) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
    """Returns the gradients of the branch's input, of its 3x3 kernels (out, 3, 3, in) and of the 1x1 kernel."""
    (B, H, W, _), half, rows = key.shape, plan.half, plan.rows
    stream, fours = nvrtc.current_stream(key.device), plan.fours
    d, applied = dout.new_empty((B, H, W, half)), dout.new_empty((B, H, W, half))
    images = d.permute(0, 3, 1, 2), applied.permute(0, 3, 1, 2)
    plan.relu_gradient(stream, outputs[2].data_ptr(), dout.data_ptr(), d.data_ptr(), bias_sums, rows)
    products: list[Tensor | None] = [None] * 3
    for i in (2, 1, 0):
        given, own, at = outputs[i - 1].data_ptr() if i else left, stats + 4 * 4 * half * i, sums + 4 * 2 * half * i
        scale = own + 4 * SCALE * half, own + 4 * SHIFT * half
        want = wanted[(*SPATIAL, POINT)[i]]
        if want or i < 2 or not plan.products:  # what a convolution takes even if its kernel's gradient is not wanted
            plan.batch_apply[i](stream, given, *scale, applied.data_ptr(), fours)
        back, products[i] = _convolve_back(plan, (d, applied), images, kernels[i], want)
        plan.batch_gradient_sums[i](stream, given, back.data_ptr(), own, partials, rows)
        plan.add_partials(stream, partials, at, plan.programs)
        plan.batch_gradient[i](stream, given, back.data_ptr(), own, at, d.data_ptr(), fours)
    return d, products[:2], products[2]


def _convolve_back(plan: Plan, maps: Any, images: Any, kernel: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of the input of a convolution and of its kernel, laid out as (out, 3, 3, in)."""
    if kernel.ndim == 2 and plan.products:
        d, applied = (t.view(plan.rows, plan.half) for t in maps)
        return torch.mm(d, kernel), torch.mm(d.t(), applied) if wanted else None
    spatial = kernel.ndim == 4
    kernel = kernel.permute(0, 3, 1, 2) if spatial else kernel.view(plan.half, plan.half, 1, 1)
    padding = [int(spatial)] * 2
    dx, dkernel, _ = torch.ops.aten.convolution_backward.default(
        *images, kernel, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, wanted, False]
    )
    return ready(dx.permute(0, 2, 3, 1)), ready(dkernel.permute(0, 2, 3, 1)) if wanted else None


def _listed(ctx: Any, flat: Tensor, products: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Returns the gradient of each parameter, in its type: parts of `flat`, or of `products` if `finish` has none."""
    plan, key, kinds = ctx.plan, ctx.key, ctx.kinds
    wanted = ctx.needs_input_grad[3:]
    found = cut(flat, plan.gradients)
    if plan.cast and not key.last and all(wanted) and kinds.count(key.kind) == len(kinds):
        return list(found)
    parts, others = iter(found), iter(products)
    gradients: list[Tensor | None] = []
    for i, (shape, dtype, want) in enumerate(zip(plan.order, kinds, wanted, strict=True)):
        gradient = next(parts) if shape else next(others)
        if not want or gradient is None:
            gradients.append(None)
            continue
        if i in SPATIAL and key.last:
            gradient = gradient.permute(0, 3, 1, 2)
        elif i == POINT:
            gradient = gradient.view(plan.half, plan.half, 1, 1)
        gradients.append(gradient if dtype == gradient.dtype else gradient.to(dtype))
    return gradients
