"""Layers around the scan as problems for their CUDA kernels, and checks against the plain expressions."""

import contextlib
import copy

import pytest
import torch
from test_cuda_kernels import CUDA, DEVICE, emulate
from torch import nn

from medmamba.kernels.block import eligibility
from medmamba.model import ConvBranch, DropPath
from medmamba.model import network as pieces

TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    if not CUDA:
        emulate(monkeypatch, processors=1)  # few programs, so that each has several turns
        monkeypatch.setattr(eligibility, "_on_cuda_backend", lambda x, backend: True)


@contextlib.contextmanager
def plain():
    """The expressions that define the layers, wherever the tensors are."""
    kept = eligibility._on_cuda_backend
    eligibility._on_cuda_backend = lambda x, backend: False
    try:
        yield
    finally:
        eligibility._on_cuda_backend = kept


def norm(channels):
    layer = nn.LayerNorm(channels)
    nn.init.uniform_(layer.weight, 0.5, 1.5), nn.init.normal_(layer.bias)
    return layer


def branch(channels):
    layers = ConvBranch(channels)
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5), nn.init.normal_(layer.bias)
    return layers


def depthwise(channels):
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels)


class EverySecond(DropPath):
    """Drops every second image."""

    def keep_mask(self, x):
        return (torch.arange(len(x), device=x.device) % 2 == 0).float().view(-1, 1, 1, 1) / (1 - self.rate)


ALL = DropPath(0.0)  # drops none


# Each: the layer it needs, the shapes of its maps, and the call; C is the width of the widest norm or convolution.
PROBLEMS = {
    "split_norm": lambda B, H, W, C: (norm(C), [(B, H, W, 2 * C)], lambda m, x: pieces.split_norm(x, m)),
    "conv_branch": lambda B, H, W, C: (branch(C), [(B, H, W, C)], lambda m, x: pieces.conv_branch(x, m)),
    "conv_silu": lambda B, H, W, C: (depthwise(C), [(B, H, W, 2 * C)], lambda m, x: pieces.conv_silu(x, m)),
    "gate_project": lambda B, H, W, C: (
        nn.Sequential(norm(C), nn.Linear(C, C // 2, bias=False)),
        [(B, H, W, C), (B, H, W, 2 * C)],
        lambda m, y, wide: pieces.gate_project(y, wide.chunk(2, -1)[1], *m),
    ),
    "channel_norm": lambda B, H, W, C: (norm(C), [(B, H, W, C)], lambda m, x: pieces.channel_norm(x, m)),
    "merge_norm": lambda B, H, W, C: (norm(4 * C), [(B, H, max(W, 2), C)], lambda m, x: pieces.merge_norm(x, m)),
    "mix": lambda B, H, W, C: (
        nn.Identity(),
        [(B, H, W, 2 * C), (B, H, W, C), (B, H, W, C)],
        lambda m, x, left, right: pieces.mix(x, left, right, ALL),
    ),
    "mix with dropped paths": lambda B, H, W, C: (
        nn.Identity(),
        [(B, H, W, 2 * C), (B, H, W, C), (B, H, W, C)],
        lambda m, x, left, right: pieces.mix(x, left, right, EverySecond(0.3)),
    ),
}


problems = pytest.mark.parametrize("name", PROBLEMS)


def problem(name, shape, dtype):
    """Layer, maps and call, in float64 but all numbers such that `dtype` holds them."""
    torch.manual_seed(0)
    layer, shapes, call = PROBLEMS[name](*shape)
    layer = layer.to(dtype).double().to(DEVICE)
    return layer, [torch.randn(size).to(dtype).double().to(DEVICE) for size in shapes], call


def backward(outputs, inputs):
    """Gradients along random numbers that every type holds."""
    generator = torch.Generator().manual_seed(1)
    along = [torch.randn(y.shape, generator=generator).bfloat16().to(y) for y in outputs]
    return list(torch.autograd.grad(outputs, inputs, along))


def listed(outputs):
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def evaluate(layer, maps, call, dtype, parameters=None):
    """All outputs, the gradients of all maps, and those of all parameters, which are of `parameters` or `dtype`."""
    layer = copy.deepcopy(layer).to(parameters or dtype)
    maps = [m.detach().to(dtype).requires_grad_() for m in maps]
    mixed = parameters is not None and parameters != dtype
    with torch.autocast(DEVICE, dtype) if mixed else contextlib.nullcontext():
        outputs = listed(call(layer, *maps))
    grads = backward(outputs, [*maps, *layer.parameters()])
    return [y.detach() for y in outputs], grads[: len(maps)], grads[len(maps) :]


def check(name, shape, dtype, parameters=None):
    """At most twice the error of the expressions in the same type, and what these may have been lucky by."""
    setting = problem(name, shape, dtype)
    with plain():
        exact, usual = evaluate(*setting, torch.float64), evaluate(*setting, dtype)
    found = evaluate(*setting, dtype, parameters)
    units = 8 if dtype == torch.float32 else 1  # a GPU's fast roots, exponentials and divisions are off by two each
    for kind, *groups in zip(("output", "gradient of map", "gradient of parameter"), found, usual, exact, strict=True):
        for i, (f, u, e) in enumerate(zip(*groups, strict=True)):
            what = f"{name}, {kind} {i}"
            assert f.shape == e.shape and f.dtype == (parameters if parameters and "parameter" in kind else dtype), what
            error, budget = ((t.double() - e).abs().max() for t in (f, u))
            allowed = 2 * budget + units * torch.finfo(dtype).eps * e.abs().max()
            assert error <= allowed, f"{what}: error {error:.2e}, the expression's {budget:.2e}, allowed {allowed:.2e}"
