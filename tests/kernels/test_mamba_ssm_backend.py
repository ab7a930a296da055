"""The mamba_ssm backend: what it hands to `selective_scan_cuda`, checked without a GPU against a stand-in that is as
strict as the extension, and the real extension where there is one."""

import sys
import types

import pytest
import torch

from medmamba import available_backends, selective_scan, selective_scan_2d
from medmamba.kernels.backends import eager as torch_backend
from medmamba.kernels.backends import mamba_ssm as mamba_ssm_backend

REASON = mamba_ssm_backend.BACKEND.why_not()


def gpu(test):
    return pytest.mark.gpu(
        pytest.mark.skipif(REASON is not None, reason=f"needs a GPU and mamba_ssm's CUDA scan: {REASON}")(test)
    )


def check(u, delta, A, B, C, D, z, delta_bias):
    """The argument checks of `selective_scan.cpp` in mamba_ssm 2.3.2, but for "is on the GPU"."""
    batch, dim, length = u.shape
    N, G = A.shape[1], B.shape[1]
    assert u.dtype in (torch.float32, torch.float16, torch.bfloat16)
    assert all(t.dtype == u.dtype for t in (delta, B, C))
    assert all(t.dtype == torch.float32 for t in (A, D, delta_bias))
    assert all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in (u, delta, B, C, D, delta_bias))
    assert delta.shape == u.shape and A.shape == (dim, N) and N <= 256 and dim % G == 0
    assert B.shape == C.shape == (batch, G, N, length)
    assert D.shape == delta_bias.shape == (dim,)
    assert z is None


def saved_states(u, A):
    """Like the extension's x: the last state is in the odd columns of the last chunk; the rest is recognisable."""
    shape = (*u.shape[:2], -(-u.shape[2] // 2048), 2 * A.shape[1])
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def fwd(u, delta, A, B, C, D, z, delta_bias, softplus):
    check(u, delta, A, B, C, D, z, delta_bias)
    y, last = torch_backend.BACKEND.scan_1d(u, delta, A, B, C, D, delta_bias, softplus)
    saved = saved_states(u, A)
    saved[:, :, -1, 1::2] = last
    return [y, saved]


def bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, softplus, recompute_out_z):
    check(u, delta, A, B, C, D, z, delta_bias)
    assert dout.shape == u.shape and dout.dtype == u.dtype and (dout.stride(-1) == 1 or u.shape[-1] == 1)
    assert out is None and dz is None and recompute_out_z is False
    if u.shape[2] > 2048:
        assert x.is_contiguous() and torch.equal(x, fwd(u, delta, A, B, C, D, z, delta_bias, softplus)[1])
    else:
        assert x is None
    grads = torch_backend.BACKEND.scan_1d_backward(dout, u, delta, A, B, C, D, delta_bias, softplus)
    return list(grads)


@pytest.fixture
def stand_in(monkeypatch):
    module = types.ModuleType("selective_scan_cuda")
    module.fwd, module.bwd = fwd, bwd
    module.__spec__ = object()  # what find_spec returns for a module already imported
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", module)


def problem_2d(B=2, H=3, W=4, C=4, R=2, N=3, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    x, proj, A = randn(B, H, W, C).to(dtype), randn(B, H, W, 4, R + 2 * N).to(dtype), -torch.rand(4, C, N, generator=g)
    tensors = (x, proj, randn(4, C, R), randn(4, C) - 1, A, randn(4, C))
    return [t.to(device) for t in tensors]


def problem_1d(B=2, C=4, L=5, G=2, N=3, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    u, delta, Bs, Cs = (t.to(dtype) for t in (randn(B, C, L), randn(B, C, L), randn(B, G, N, L), randn(B, G, N, L)))
    tensors = (u, delta, -torch.rand(C, N, generator=g), Bs, Cs, randn(C), randn(C) - 1)
    return [t.to(device) for t in tensors]


def compare(actual, expected, inputs, **tolerance):
    for a, e, i in zip(actual, expected, inputs, strict=True):
        assert a.shape == e.shape == i.shape and a.dtype == e.dtype and a.is_contiguous()
        torch.testing.assert_close(a, e, **tolerance)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (dict(), torch.float32),
        (dict(H=1, W=1, N=1, R=1), torch.float32),
        (dict(), torch.bfloat16),
        (dict(B=1, H=3, W=683, C=2, R=1, N=2), torch.float32),  # 2049 tokens: the kernel needs its own states
    ],
    ids=str,
)
def test_2d(shape, dtype, stand_in):
    tensors = problem_2d(**shape, dtype=dtype)
    x, A = tensors[0], tensors[4]
    B, H, W, C = x.shape
    states = torch.full((B, 4, -(-H * W // mamba_ssm_backend.CHUNK), A.shape[2], C), torch.nan)
    y = mamba_ssm_backend.BACKEND.scan_2d(*tensors, states)
    compare([y], [torch_backend.BACKEND.scan_2d(*tensors, states)], [x])
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = mamba_ssm_backend.BACKEND.scan_2d_backward(dy, *tensors, states)
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    compare(grads, torch_backend.BACKEND.scan_2d_backward(dy, *tensors, states), tensors, **tolerance)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(dict(), torch.float32), (dict(G=1, L=1), torch.float16), (dict(C=2, G=1, L=2049), torch.float32)],
)
def test_1d(shape, dtype, softplus, stand_in):
    tensors = problem_1d(**shape, dtype=dtype)
    if not softplus:  # step sizes are positive
        tensors[1], tensors[6] = tensors[1].abs(), tensors[6].abs()
    y, last = mamba_ssm_backend.BACKEND.scan_1d(*tensors, softplus)
    compare([y, last], torch_backend.BACKEND.scan_1d(*tensors, softplus), [y, last])
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = mamba_ssm_backend.BACKEND.scan_1d_backward(dy, *tensors, softplus)
    expected = torch_backend.BACKEND.scan_1d_backward(dy, *tensors, softplus)
    compare(grads, expected, tensors, rtol=1e-3, atol=1e-3)


def test_1d_of_constant_b_and_c(stand_in, monkeypatch):
    """selective_scan hands over B and C expanded along the length, with a stride of 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mamba_ssm_backend.BACKEND, "why_not_on", lambda device, dtype: None)
    u, delta, A, *_ = problem_1d()
    constant = torch.randn(A.shape, generator=torch.Generator().manual_seed(1))
    y, expected = (selective_scan(u, delta, A, constant, constant, backend=b) for b in ("mamba_ssm", "torch"))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("G", [1, 2, 4])
def test_1d_trains_through_the_operator(G, stand_in, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mamba_ssm_backend.BACKEND, "why_not_on", lambda device, dtype: None)
    tensors = [t.requires_grad_() for t in problem_1d(G=G)]
    u, delta, A, B, C, D, bias = tensors
    grads = [
        torch.autograd.grad(selective_scan(u, delta, A, B, C, D, u, bias, True, backend=name).square().sum(), tensors)
        for name in ("mamba_ssm", "torch")
    ]
    compare(*grads, tensors, rtol=1e-3, atol=1e-3)


def test_operator_runs_it(stand_in, monkeypatch):
    """Through autograd, and so with the states that the operator makes room for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mamba_ssm_backend.BACKEND, "why_not_on", lambda device, dtype: None)
    tensors = [t.requires_grad_() for t in problem_2d(B=1, H=1, W=2049, C=1, R=1, N=1)]
    grads = [
        torch.autograd.grad(selective_scan_2d(*tensors, backend=backend).square().sum(), tensors)
        for backend in ("mamba_ssm", "torch")
    ]
    compare(*grads, tensors, rtol=1e-3, atol=1e-3)


def test_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(mamba_ssm_backend.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in available_backends()["mamba_ssm"]
    monkeypatch.setattr(mamba_ssm_backend.importlib.util, "find_spec", lambda name: object())

    def undefined_symbol():
        raise ImportError("undefined symbol: _ZN3c107WarningC1E")

    monkeypatch.setattr(mamba_ssm_backend, "_kernel", undefined_symbol)
    assert "_ZN3c107WarningC1E" in mamba_ssm_backend.BACKEND.why_not()
    assert "MAMBA_FORCE_BUILD" in mamba_ssm_backend.BACKEND.why_not()
    assert "cpu" in mamba_ssm_backend.BACKEND.why_not_on(torch.device("cpu"), torch.float32)
    assert "float64" in mamba_ssm_backend.BACKEND.why_not_on(torch.device("cuda"), torch.float64)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(7, 7), (13, 29), (56, 56)], ids=str)
def test_real_kernel(size, dtype):
    tensors = [t.requires_grad_() for t in problem_2d(H=size[0], W=size[1], C=32, N=16, dtype=dtype, device="cuda")]
    results = []
    for backend in ("mamba_ssm", "torch"):
        y = selective_scan_2d(*tensors, backend=backend)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), tensors)])
    for a, e in zip(*results, strict=True):
        scale = e.float().abs().max().item()
        torch.testing.assert_close(a, e, rtol=2e-2, atol=(1e-3 if dtype == torch.float32 else 3e-2) * scale)


@gpu
def test_same_logits():
    import medmamba

    torch.manual_seed(0)
    model = medmamba.create_model("nano", num_classes=4).eval().cuda()
    images = torch.randn(2, 3, 224, 224, device="cuda")
    logits = []
    with torch.inference_mode():
        for backend in ("mamba_ssm", "torch"):
            model.set_scan_backend(backend)
            logits.append(model(images))
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


@gpu
def test_under_autocast():
    """The published design's usual precision; the kernel wants all of its tensors in one type."""
    import medmamba

    torch.manual_seed(0)
    model = medmamba.create_model("test", num_classes=4, drop_path_rate=0.0).cuda()
    model.set_scan_backend("mamba_ssm")
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(torch.randn(2, 3, 64, 64, device="cuda")).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
