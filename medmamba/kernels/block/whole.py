"""A whole SS-Conv-SSM block in training as one differentiable function, made of those of `training.py`.

The kernels and products are those of the pieces. One function instead of some twenty nodes of autograd takes a third of
the time of the CPU, which bounds training without a CUDA graph; and in a graph the convolutions run beside the scan.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from ..backends import cuda as cuda_backend
from ..cuda import graph_capture
from ..reference import pad_rank
from . import eligibility
from .autocast import in_its_types
from .registry import replaces
from .training import ConvSilu, GateProject, Mix, SplitNorm
from .training_conv import ConvBranch, branch_parts

K = cuda_backend.K


@replaces("run_block", eligibility.fits_block)
def run_block(x: Tensor, block: Any) -> Tensor:
    ssm, norm = block.ssm, block.norm
    norms, parameters = branch_parts(block.conv)
    own = (
        norm.weight, norm.bias, ssm.in_proj.weight, ssm.conv.weight, ssm.conv.bias, ssm.x_proj, ssm.dt_weight,
        ssm.dt_bias, ssm.A_log, ssm.D, ssm.out_norm.weight, ssm.out_norm.bias, ssm.out_proj.weight,
    )  # fmt: skip
    settings = _Settings(norm.eps, ssm.out_norm.eps, norms)
    return Block.apply(x, block.drop_path.keep_mask(x), settings, *own, *parameters)


class _Settings(NamedTuple):
    eps: float
    out_eps: float
    norms: list


class _Part:
    """The context of a function whose passes another function runs."""

    def __init__(self, *needs_input_grad: bool):
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


def _backward(function: type[Function]) -> Callable[..., Any]:
    """Returns the backward pass of a function without the check that it is called once."""
    return function.backward.__wrapped__  # type: ignore[attr-defined]


class Block(Function):
    """Computes `SSConvSSM` of x (B, H, W, 2C); `keep` (B, 1, 1, 1) scales the scan branch of each image, or None."""

    @staticmethod
    def forward(ctx, x, keep, settings, *parameters):
        wanted = ctx.needs_input_grad[3:]
        any_wanted = any(ctx.needs_input_grad)
        own, branch = parameters[:13], parameters[13:]
        norm_w, norm_b, in_proj, conv_w, conv_b, x_proj, dt_weight, dt_bias, A_log, D, gate_w, gate_b, out_proj = own
        parts = (
            _Part(any_wanted, *wanted[:2], False),
            _Part(any_wanted, False, *wanted[13:]),
            _Part(any_wanted, *wanted[3:5]),
            _Part(any_wanted, any_wanted, *wanted[10:12], False, wanted[12]),
            _Part(any_wanted),
        )
        x, left, right = SplitNorm.forward(parts[0], x, norm_w, norm_b, settings.eps)
        convolved = graph_capture.run_beside(left, lambda: ConvBranch.forward(parts[1], left, settings.norms, *branch))
        matrix = in_proj.to(x.dtype)
        scanned, gate = ConvSilu.forward(parts[2], F.linear(right, matrix), conv_w, conv_b)
        codes, weights = pad_rank(x_proj, dt_weight)
        codes = codes.flatten(0, 1).to(x.dtype)
        proj = F.linear(scanned, codes).unflatten(-1, (K, -1))
        A = A_log.float().exp().neg_()
        scan = weights, dt_bias, A, D
        states = cuda_backend.new_states(scanned, A) if any_wanted else scanned.new_empty(0)
        y = cuda_backend.BACKEND.scan_2d(scanned, proj, *scan, states)
        out = GateProject.forward(parts[3], y, gate, gate_w, gate_b, settings.out_eps, out_proj)
        out = Mix.forward(parts[4], x, convolved(), out, keep)
        if any_wanted:
            ctx.parts, ctx.counts = parts, [len(part.saved_tensors) for part in parts]
            ctx.rank, ctx.types = dt_weight.shape[2], [p.dtype for p in own]
            saved = [t for part in parts for t in part.saved_tensors]
            for part in parts:
                part.saved_tensors = ()
            ctx.save_for_backward(right, matrix, scanned, codes, proj, *scan, states, *saved)
        return out

    @staticmethod
    @once_differentiable
    @in_its_types
    def backward(ctx, dout):
        wanted, parts = ctx.needs_input_grad[3:], ctx.parts
        saved = ctx.saved_tensors  # once, as checkpointing demands
        right, matrix, scanned, codes, proj, weights, bias, A, D, states = saved[:10]
        at = 10
        for part, count in zip(parts, ctx.counts, strict=True):
            part.saved_tensors = saved[at : at + count]
            at += count
        dx, dconvolved, dscanned, _ = _backward(Mix)(parts[4], dout)
        branch = graph_capture.run_beside(dconvolved, lambda: _backward(ConvBranch)(parts[1], dconvolved))
        # Maps are freed as soon as they have been read, since autograd frees nothing within a function.
        dy, dgate, dgate_w, dgate_b, _, dout_proj = _backward(GateProject)(parts[3], dscanned)
        del dscanned
        inputs = scanned, proj, weights, bias, A, D
        dx_scan, dproj, dweights, dbias, dA, dD = cuda_backend.BACKEND.scan_2d_backward(dy, *inputs, states)
        del dy
        rows, channels = dproj.flatten(3).flatten(0, 2), scanned.flatten(0, 2)
        dcodes = rows.mT @ channels if wanted[5] else None
        d = torch.addmm(dx_scan.view(channels.shape), rows, codes).view(scanned.shape)
        del dx_scan, dproj, rows
        dwide, dconv_w, dconv_b = _backward(ConvSilu)(parts[2], d, dgate)
        del d, dgate
        wide = dwide.flatten(0, 2)
        din_proj = wide.mT @ right.flatten(0, 2) if wanted[2] else None
        dright = (wide @ matrix).view(right.shape)
        del wide, dwide
        dleft, _, *dbranch = branch()
        dx, dnorm_w, dnorm_b, _ = _backward(SplitNorm)(parts[0], dx, dleft, dright)
        dx_proj, ddt_weight = _cut(dcodes, dweights, ctx.rank)
        own = (
            dnorm_w, dnorm_b, din_proj, dconv_w, dconv_b, dx_proj, ddt_weight, dbias, dA * A, dD,
            dgate_w, dgate_b, dout_proj,
        )  # fmt: skip
        for part in parts:
            part.saved_tensors = ()
        gradients = [g.to(t) if g is not None else None for g, t in zip(own, ctx.types, strict=True)]
        return dx, None, None, *gradients, *dbranch


def _cut(dcodes: Tensor | None, ddt_weight: Tensor, R: int) -> tuple[Tensor | None, Tensor]:
    """Returns the gradients of x_proj and dt_weight from those of the padded ones."""
    padded = ddt_weight.shape[2]
    if dcodes is not None:
        dcodes = dcodes.view(K, -1, dcodes.shape[1])
        if padded > R:
            dcodes = torch.cat((dcodes[:, :R], dcodes[:, padded:]), 1)
    return dcodes, ddt_weight[..., :R].contiguous()
