"""Derivatives of the scan beyond the first backward pass, tracing, empty inputs, and what is refused."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from scan_problems import problem_2d

import medmamba
from medmamba import selective_scan, selective_scan_2d
from medmamba.kernels import reference
from medmamba.kernels.backends import cpu as native

BACKENDS = ["torch", "native"] if native.BACKEND.why_not() is None else ["torch"]
backends = pytest.mark.parametrize("backend", BACKENDS)


def problem_1d(length=6, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = dict(u=(2, 4, length), delta=(2, 4, length), A=(4, 3), B=(2, 3, length), C=(2, 3, length), D=(4,))
    found = {name: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}
    return found | {"A": -found["A"].exp()}


def along(function, x, direction, step=1e-5):
    """The derivative by differences, in float64."""
    return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


@backends
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D"])
def test_forward_mode_of_the_1d_scan(backend, name):
    given = problem_1d()

    def scan(t, dtype=torch.float32, backend=backend):
        every = {n: v.to(dtype) for n, v in given.items()} | {name: t}
        return selective_scan(**every, z=every["u"], delta_softplus=True, backend=backend)

    direction = torch.randn(given[name].shape, generator=torch.Generator().manual_seed(1))
    expected = along(lambda t: scan(t, torch.float64, "torch"), given[name].double(), direction.double())
    _, found = torch.func.jvp(scan, (given[name],), (direction,))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    with fwAD.dual_level():
        found = fwAD.unpack_dual(scan(fwAD.make_dual(given[name], direction))).tangent
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@backends
def test_forward_mode_of_the_2d_scan_and_under_compile(backend):
    x, *rest = problem_2d(H=2, W=3, C=4, R=1, N=2)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    wide = [t.double() for t in rest]
    expected = along(lambda t: reference.scan_2d(t, *wide), x.double(), direction.double())

    def tangent(x):
        return torch.func.jvp(lambda t: selective_scan_2d(t, *rest, backend=backend), (x,), (direction,))[1]

    torch.testing.assert_close(tangent(x).double(), expected, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(tangent, backend="aot_eager")
    torch.testing.assert_close(compiled(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_forward_mode_of_the_model(tiny_model, fused):
    model = tiny_model.fuse() if fused else tiny_model
    g = torch.Generator().manual_seed(1)
    x, direction = torch.randn(1, 3, 32, 32, generator=g), torch.randn(1, 3, 32, 32, generator=g)
    _, found = torch.func.jvp(model, (x,), (direction,))
    rows = torch.func.jacrev(model)(x)  # (1, classes, 1, 3, 32, 32), by the backward pass of the kernels
    expected = (rows * direction).sum((2, 3, 4, 5))
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@backends
def test_second_derivatives(backend):
    given = problem_1d(length=4, dtype=torch.float64 if backend == "torch" else torch.float32)

    def second(backend, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in given.values()]
        y = selective_scan(*inputs, delta_softplus=True, backend=backend)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    for found, expected in zip(second(backend, given["u"].dtype), second("torch", torch.float64), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    if backend == "torch":
        inputs = [t.requires_grad_() for t in given.values()]
        assert torch.autograd.gradgradcheck(lambda *t: selective_scan(*t, delta_softplus=True), inputs)
        maps = [t.double().requires_grad_() for t in problem_2d(H=1, W=3, C=2, R=1, N=2)]
        assert torch.autograd.gradgradcheck(selective_scan_2d, maps)


@backends
def test_transforms_of_torch_func(backend):
    given = problem_1d()
    stacked = torch.stack([given["u"], 2 * given["u"]])
    rest = [t for name, t in given.items() if name != "u"]

    def scan(u):
        return selective_scan(u, *rest, delta_softplus=True, backend=backend)

    def gradient(u):
        u = u.clone().requires_grad_()
        return torch.autograd.grad(scan(u).square().sum(), u)[0]

    per_sample = torch.func.vmap(torch.func.grad(lambda u: scan(u).square().sum()))(stacked)
    for found, slope, u in zip(torch.func.vmap(scan)(stacked), per_sample, stacked, strict=True):
        torch.testing.assert_close(found, scan(u))
        torch.testing.assert_close(slope, gradient(u), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("fused", [False, True])
def test_traces_with_and_without_gradients(tiny_model, fused):
    model = tiny_model.fuse() if fused else tiny_model
    x = torch.randn(2, 3, 32, 32)
    traced = torch.jit.trace(model, x)  # with its check, which runs without gradients
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))
    torch.testing.assert_close(traced(x), model(x))
    grads = []
    for module in (traced, model):
        x = x.detach().requires_grad_()
        grads += torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_tensorboard_draws_the_model(tiny_model, tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        writer.add_graph(tiny_model, torch.randn(1, 3, 32, 32))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 1000


@backends
@pytest.mark.parametrize("empty", ["batch", "length"])
def test_nothing_in_nothing_out(backend, empty):
    given = problem_1d()
    for name, t in given.items():
        if name not in "AD":
            given[name] = t[:0] if empty == "batch" else t[..., :0]
    inputs = {name: t.requires_grad_() for name, t in given.items()}
    y, last = selective_scan(**inputs, z=inputs["u"], return_last_state=True, backend=backend)
    assert y.shape == inputs["u"].shape
    assert torch.equal(last, torch.zeros(len(y), 4, 3))
    grads = torch.autograd.grad(y.sum(), list(inputs.values()))
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(grads, inputs.values(), strict=True))
    if empty == "batch":
        maps = [t.requires_grad_() for t in problem_2d(B=0, H=2, W=3, C=4, R=1, N=2)]
        y = selective_scan_2d(*maps, backend=backend)
        assert y.shape == (0, 2, 3, 4)
        assert all((g == 0).all() for g in torch.autograd.grad(y.sum(), maps))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_model_answers_nothing_to_no_images(tiny_model, dtype):
    nothing = torch.empty(0, 3, 64, 64)
    assert tiny_model(nothing).shape == (0, 3)
    assert tiny_model.fuse(dtype)(nothing).shape == (0, 3)


@pytest.mark.parametrize("groups", [(2, 3), (4, 6), (3, 12), (1, 4), (6, 4)])
def test_groups_that_do_not_divide_each_other(groups):
    g = torch.Generator().manual_seed(0)
    u, delta = torch.randn(2, 12, 5, generator=g), torch.randn(2, 12, 5, generator=g)
    A = -torch.rand(12, 3, generator=g)
    B, C = (torch.randn(2, G, 3, 5, generator=g) for G in groups)
    each = [t.repeat_interleave(12 // t.shape[1], dim=1) for t in (B, C)]  # a group for each channel
    for backend in BACKENDS:
        found = selective_scan(u, delta, A, B, C, delta_softplus=True, backend=backend)
        torch.testing.assert_close(found, selective_scan(u, delta, A, *each, delta_softplus=True, backend="torch"))


def test_what_does_not_fit_is_named():
    given = problem_1d()
    for z in (given["u"][:, :2], given["u"][..., :1], given["u"][0]):
        with pytest.raises(ValueError, match="z has shape"):
            selective_scan(**given, z=z)
    with pytest.raises(ValueError, match=r"VMamba's function has no z: name the argument, delta_bias="):
        selective_scan(*given.values(), torch.randn(4), True)
    with pytest.raises(ValueError, match="A is on meta, but u on cpu"):
        selective_scan(**given | {"A": given["A"].to("meta")})
    with pytest.raises(ValueError, match=r"B is torch.int64"):
        selective_scan(**given | {"B": given["B"].long()})
    with pytest.raises(ValueError, match="A has shape"):
        selective_scan(**given | {"A": given["A"][0]})
    with pytest.raises(ValueError, match="complex"):
        selective_scan(**given | {"u": given["u"] + 0j, "delta": given["delta"] + 0j})
    with pytest.raises(ValueError, match="B has shape"):
        selective_scan(**given | {"B": torch.empty(2, 0, 3, 6)})
    x, *rest = problem_2d(H=2, W=3, C=4, R=1, N=2)
    with pytest.raises(ValueError, match="D is on meta, but x on cpu"):
        selective_scan_2d(x, *rest[:-1], rest[-1].to("meta"))
    with pytest.raises(ValueError, match=r"x must be \(B, H, W, C\)"):
        selective_scan_2d(x[0], *rest)


def test_code_of_vmamba_runs_as_the_docstring_says():
    """Its function: no z, softplus by default, float32 out unless oflex is off."""
    lines = [line.strip()[4:] for line in selective_scan.__doc__.splitlines() if line.strip()[:3] in (">>>", "...")]
    namespace = {"selective_scan": medmamba.selective_scan}
    exec("\n".join(lines), namespace)
    given, bias = problem_1d(dtype=torch.bfloat16), torch.randn(4)
    wide = {name: t.float() for name, t in given.items()}
    found = namespace["selective_scan_fn"](*given.values(), bias)
    expected = selective_scan(**wide, delta_bias=bias, delta_softplus=True, backend="torch")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
