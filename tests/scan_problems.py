"""Scans to try kernels on, and how wrong they may be."""

import torch


def problem_2d(B=1, H=5, W=7, C=16, R=3, N=16, dtype=torch.float32, seed=0, device="cpu"):
    """Numbers like those of a trained model: step sizes from 0.001 to 1, decays from 1 to N."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    x, proj = randn(B, H, W, C).to(dtype), randn(B, H, W, 4, R + 2 * N).to(dtype)
    A = -torch.arange(1, N + 1) * (0.5 + torch.rand(4, C, N, generator=g))
    tensors = (x, proj, randn(4, C, R) * R**-0.5, randn(4, C) - 2, A, randn(4, C))
    return [t.to(device) for t in tensors]


def assert_within_budget(actual, loop, exact, names):
    """At most three times the error of PyTorch's own float32 loop, plus what that may have been lucky by: four units in
    the last place of float32, one of half precision (to which the interpreter truncates where a GPU rounds)."""
    for name, a, f, e in zip(names, actual, loop, exact, strict=True):
        assert a.shape == f.shape and a.dtype == f.dtype and a.is_contiguous(), name
        if a.numel() == 0:
            continue
        scale = e.abs().max()
        error, budget = ((t.double() - e).abs().max() for t in (a, f))
        units = 4 if a.dtype == torch.float32 else 1
        allowed = 3 * budget + units * torch.finfo(a.dtype).eps * scale
        assert error <= allowed, f"{name}: error {error:.2e}, the loop's {budget:.2e}, on a scale of {scale:.2e}"
