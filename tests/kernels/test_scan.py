"""The scan operators: the definition against a hand-written loop, gradients, operator contract, drop-in behaviour."""

import time

import pytest
import torch
import torch.nn.functional as F

from medmamba import BackendError, selective_scan, selective_scan_2d
from medmamba.kernels import reference, resolve_backend


def inputs_2d(B=2, H=3, W=5, C=4, R=2, N=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    x, proj = randn(B, H, W, C), randn(B, H, W, 4, R + 2 * N)
    return x, proj, randn(4, C, R), randn(4, C), -randn(4, C, N).exp(), randn(4, C)


def inputs_1d(B=2, C=8, L=7, N=3, G=4, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return randn(B, C, L), randn(B, C, L), -randn(C, N).exp(), randn(B, G, N, L), randn(B, G, N, L), randn(C), randn(C)


def by_hand_2d(x, proj, dt_weight, dt_bias, A, D):
    """Scalar loops over pixels, written without the package's helpers."""
    B, H, W, C = x.shape
    R, N = dt_weight.shape[2], A.shape[2]
    rows = [(i, j) for i in range(H) for j in range(W)]
    cols = [(i, j) for j in range(W) for i in range(H)]
    y = torch.zeros_like(x)
    for k, order in enumerate((rows, cols, rows[::-1], cols[::-1])):
        for b in range(B):
            for c in range(C):
                h = torch.zeros(N, dtype=x.dtype)
                for i, j in order:
                    code, Bt, Ct = proj[b, i, j, k].split((R, N, N))
                    dt = torch.log1p(torch.exp(dt_weight[k, c] @ code + dt_bias[k, c]))
                    h = torch.exp(dt * A[k, c]) * h + dt * x[b, i, j, c] * Bt
                    y[b, i, j, c] += h @ Ct + D[k, c] * x[b, i, j, c]
    return y


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 2)])
def test_definition_is_the_recurrence(size):
    tensors = inputs_2d(B=2, H=size[0], W=size[1])
    torch.testing.assert_close(reference.scan_2d(*tensors), by_hand_2d(*tensors))


def test_2d_gradients():
    tensors = [t.requires_grad_() for t in inputs_2d(H=2, W=3)]
    assert torch.autograd.gradcheck(lambda *t: selective_scan_2d(*t, backend="torch"), tensors)


@pytest.mark.parametrize("softplus", [True, False])
def test_1d_gradients(softplus):
    u, delta, *rest = inputs_1d(L=4)
    if not softplus:  # a step size far below zero makes the state explode
        delta = delta.abs() * 0.1
        rest[-1].abs_().mul_(0.1)
    tensors = [t.requires_grad_() for t in (u, delta, *rest)]
    z = torch.randn(2, 8, 4, dtype=torch.float64, requires_grad=True)

    def scan(u, delta, A, B, C, D, bias, z):
        return selective_scan(u, delta, A, B, C, D, z, bias, softplus, backend="torch")

    assert torch.autograd.gradcheck(scan, [*tensors, z])


def test_written_out_backward_is_that_of_autograd():
    tensors = [t.requires_grad_() for t in inputs_2d(B=1, H=4, W=6, C=8)]
    weights = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    expected = torch.autograd.grad((reference.scan_2d(*tensors) * weights).sum(), tensors)
    actual = torch.autograd.grad((selective_scan_2d(*tensors, backend="torch") * weights).sum(), tensors)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_operator_contract():
    tensors = [t.requires_grad_() for t in inputs_2d(dtype=torch.float32)]
    torch.library.opcheck(torch.ops.medmamba.scan_2d.default, (*tensors, "torch", 0))
    tensors = [t.requires_grad_() for t in inputs_1d(dtype=torch.float32)]
    torch.library.opcheck(torch.ops.medmamba.scan_1d.default, (*tensors, True, "torch"))


def test_backward_without_saved_states_makes_them():
    tensors = [t.requires_grad_() for t in inputs_2d(H=9, W=16, N=16, dtype=torch.float32)]
    with_states = torch.autograd.grad(selective_scan_2d(*tensors).square().sum(), tensors)
    without = torch.autograd.grad(torch.ops.medmamba.scan_2d(*tensors, "auto", 0)[0].square().sum(), tensors)
    for a, e in zip(without, with_states, strict=True):
        torch.testing.assert_close(a, e)
    with pytest.raises(ValueError, match="saves a state every"):
        torch.ops.medmamba.scan_2d(*tensors, "native", 7)


def test_compiles_and_exports_as_one_node():
    class Scan(torch.nn.Module):
        def forward(self, *tensors):
            return selective_scan_2d(*tensors, backend="torch")

    tensors = inputs_2d(dtype=torch.float32)
    expected = Scan()(*tensors)
    compiled = torch.compile(Scan(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), expected)
    program = torch.export.export(Scan(), tensors)
    assert sum("medmamba.scan_2d" in str(node.target) for node in program.graph.nodes) == 1
    torch.testing.assert_close(program.module()(*tensors), expected)


def test_half_precision_keeps_the_recurrence_in_float32():
    x, proj, *parameters = inputs_2d(H=8, W=8, dtype=torch.float32)
    half = [x.bfloat16(), proj.bfloat16()]
    y = selective_scan_2d(*half, *parameters, backend="torch")
    assert y.dtype == torch.bfloat16
    expected = reference.scan_2d(*(t.double() for t in (*half, *parameters)))
    # Only the rounding of the output is left: half a unit in the last place of bfloat16's 8 bits.
    assert ((y.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-6).all()


def test_backward_is_linear_in_length():
    def seconds(length):
        tensors = [t.requires_grad_() for t in inputs_2d(B=1, H=1, W=length, C=2, N=2, dtype=torch.float32)]
        y = selective_scan_2d(*tensors, backend="torch").sum()
        start = time.process_time()
        y.backward()
        return time.process_time() - start

    seconds(64)
    # Of the processor's time, which other processes do not use up; a quadratic backward would take 64 times as much.
    assert min(seconds(4096) for _ in range(2)) < 30 * min(seconds(512) for _ in range(3))


def drop_in_reference(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """The documented behaviour of mamba_ssm's function, as one loop per channel."""
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    batch, channels, length = u.shape

    def at(t, b, c, i):
        if t.ndim == 2:
            return t[c]
        return t[b, :, i] if t.ndim == 3 else t[b, c // (channels // t.shape[1]), :, i]

    y, h = torch.zeros_like(u), torch.zeros(batch, channels, A.shape[1], dtype=u.dtype)
    for b in range(batch):
        for c in range(channels):
            for i in range(length):
                h[b, c] = torch.exp(dt[b, c, i] * A[c]) * h[b, c] + dt[b, c, i] * u[b, c, i] * at(B, b, c, i)
                y[b, c, i] = h[b, c] @ at(C, b, c, i) + (0 if D is None else D[c] * u[b, c, i])
    return (y if z is None else y * F.silu(z)), h


@pytest.mark.parametrize("b_kind", ["constant", "shared", "grouped"])
@pytest.mark.parametrize("c_kind", ["constant", "shared", "grouped"])
@pytest.mark.parametrize("extras", [True, False])
def test_drop_in(b_kind, c_kind, extras):
    u, delta, A, B, C, D, bias = inputs_1d()
    pick = {"constant": lambda t: A.roll(1, 0), "shared": lambda t: t[:, 0], "grouped": lambda t: t}
    B, C = pick[b_kind](B), pick[c_kind](C)
    options = dict(D=D, z=torch.randn_like(u), delta_bias=bias, delta_softplus=True) if extras else {}
    delta = delta if extras else delta.abs()
    y, last = selective_scan(u, delta, A, B, C, return_last_state=True, backend="torch", **options)
    expected_y, expected_last = drop_in_reference(u, delta, A, B, C, **options)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(last, expected_last)


def test_drop_in_takes_positions_as_mamba_ssm_does():
    u, delta, A, B, C, D, bias = inputs_1d(dtype=torch.float32)
    z = torch.randn_like(u)
    positional = selective_scan(u, delta, A, B, C, D, z, bias, True, False)
    torch.testing.assert_close(
        positional, selective_scan(u, delta, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True, backend="torch")
    )


def test_wrong_shapes_are_named():
    x, proj, dt_weight, dt_bias, A, D = inputs_2d()
    with pytest.raises(ValueError, match="proj has shape"):
        selective_scan_2d(x, proj[..., :-1], dt_weight, dt_bias, A, D)
    u, delta, A, B, C, D, bias = inputs_1d()
    with pytest.raises(ValueError, match="B has shape"):
        selective_scan(u, delta, A, B[:, :3], C)
    with pytest.raises(ValueError, match="delta_bias has shape"):
        selective_scan(u, delta, A, B, C, delta_bias=bias[:2])
    with pytest.raises(ValueError, match="complex"):
        selective_scan(u, delta, A.to(torch.complex128), B, C)


def test_backend_choice(monkeypatch):
    cpu = torch.device("cpu")
    assert resolve_backend(cpu, torch.float64) == "torch"
    assert resolve_backend(cpu, torch.float32, "torch") == "torch"
    monkeypatch.setenv("MEDMAMBA_SCAN", "torch")
    assert resolve_backend(cpu, torch.float32) == "torch"
    monkeypatch.setenv("MEDMAMBA_SCAN", "quantum")
    with pytest.raises(BackendError, match=r"unknown scan backend 'quantum'; choose one of: auto, native"):
        resolve_backend(cpu, torch.float32)
    with pytest.raises(BackendError, match="'native' cannot run here"):
        resolve_backend(cpu, torch.float64, "native")


def test_missing_fast_backend_warns_once_with_the_fix(monkeypatch):
    from medmamba.kernels.backends import cpu as native

    monkeypatch.delenv("MEDMAMBA_SCAN", raising=False)
    monkeypatch.setattr(native.BACKEND, "why_not", lambda: "no library for this platform; do X")
    with pytest.warns(UserWarning, match=r"plain PyTorch.*native: no library for this platform; do X"):
        assert resolve_backend(torch.device("cpu"), torch.float32) == "torch"


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_autocast_does_not_reach_into_the_scan(backend):
    """Matrix products inside a backend would else be in bfloat16."""
    tensors = [t.requires_grad_() for t in inputs_2d(dtype=torch.float32)]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = selective_scan_2d(*tensors, backend=backend)
            results.append((y, *torch.autograd.grad(y.square().sum(), tensors)))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)
