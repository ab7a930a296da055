"""The CUDA kernels of the one-dimensional scan against the float64 definition, on a GPU or in the emulator."""

import pytest
import torch
from scan_problems import assert_within_budget
from test_cuda_kernels import CUDA, DEVICE, emulate, gpu, runs

from medmamba import selective_scan
from medmamba.kernels.backends import cuda as cuda_backend
from medmamba.kernels.backends import eager as torch_backend
from medmamba.kernels.cuda import lines


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    lines.plan_for.cache_clear()
    if not CUDA:
        emulate(monkeypatch, processors=2)
    yield
    lines.plan_for.cache_clear()


def problem(
    batch=1, channels=8, L=40, N=16, groups=1, dtype=torch.float32, projection=None, step=None, softplus=True, seed=0
):
    """Numbers like those of a trained model. `projection` is the dtype of B and C, `step` that of delta, if others."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    u, delta = randn(batch, channels, L), randn(batch, channels, L)
    bias = randn(channels) - 2
    if not softplus:
        delta, bias = delta.abs() / 9, bias.abs() / 9
    A = -torch.arange(1, N + 1) * (0.5 + torch.rand(channels, N, generator=g))
    B, C = (randn(batch, groups, N, L).to(projection or dtype) for _ in range(2))
    return [t.to(DEVICE) for t in (u.to(dtype), delta.to(step or dtype), A, B, C, randn(channels), bias)]


def check(tensors, softplus=True, plan=None):
    double = [t.double() for t in tensors]
    found = cuda_backend.BACKEND.scan_1d(*tensors, softplus, plan=plan)
    exact, loop = (torch_backend.BACKEND.scan_1d(*t, softplus) for t in (double, tensors))
    assert_within_budget(found, loop, exact, ["y", "last state"])
    dy = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(tensors[0])
    grads = cuda_backend.BACKEND.scan_1d_backward(dy, *tensors, softplus, plan=plan)
    exact = torch_backend.BACKEND.scan_1d_backward(dy.double(), *double, softplus)
    loop = torch_backend.BACKEND.scan_1d_backward(dy, *tensors, softplus)
    assert_within_budget(grads, loop, exact, ["du", "ddelta", "dA", "dB", "dC", "dD", "dbias"])


@runs
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(dict(L=40, batch=2), marks=pytest.mark.slow),  # a single segment
        dict(L=160, channels=12, groups=2),  # three, the last with room for its state
    ],
    ids=str,
)
def test_values_and_gradients(sizes):
    check(problem(**sizes))


@runs
@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        dict(L=1, N=16, channels=3),
        dict(L=196, N=16, channels=18, groups=2, dtype=torch.bfloat16),  # too short a last segment for its state
        dict(L=133, N=11, channels=10, batch=2, dtype=torch.float16),  # lines that are aligned to two bytes
        dict(L=49, N=7, channels=20, groups=2, dtype=torch.bfloat16, projection=torch.float32),
        dict(L=140, N=5, channels=6, dtype=torch.bfloat16, step=torch.float32),
        dict(L=72, N=16, channels=6, projection=torch.bfloat16, step=torch.float16),
        dict(L=260, N=8, channels=9, dtype=torch.bfloat16),
        dict(L=300, N=1, channels=70, groups=2, dtype=torch.bfloat16),  # two segments of one state
        dict(L=49, N=1, channels=12, groups=3),  # four lines in a warp
        dict(L=100, N=2, channels=7, dtype=torch.float16),
        dict(L=520, N=3, channels=5, softplus=False),
    ],
    ids=str,
)
def test_odd_sizes_and_types(sizes):
    check(problem(**sizes), sizes.get("softplus", True))


@runs
@pytest.mark.slow
def test_parts_of_a_group_and_every_other_plan():
    """Channels shared by several programs, whose gradients of B and C are added afterwards; warps without channels."""
    tensors = problem(L=150, channels=21, batch=2, dtype=torch.bfloat16)
    for plan in (lines.Plan(warps=1, parts=4, segment_warps=2), lines.Plan(warps=3, segment_warps=7, parts=2)):
        check(tensors, plan=plan)
    check(tensors, plan=lines.Plan(across=2))
    check(tensors, plan=lines.Plan(packed=1))
    check(problem(L=300, channels=10, N=3, groups=2), plan=lines.Plan(across=3))
    check(problem(L=150, channels=9, N=1, dtype=torch.bfloat16), plan=lines.Plan(rows=4, segment_warps=2))
    tensors = problem(L=30, channels=21, N=5)
    for across in (0, 3):
        check(tensors, plan=lines.Plan(warps=2, across=across, rows=2, segment_warps=3, parts=2))


@runs
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def test_views_are_read_where_they_lie(dtype):
    """Halves of wider tensors, tokens that are not adjacent, and one B for all tokens: the same bits as copies."""
    u, delta, A, B, C, D, bias = problem(L=72, N=4, channels=6, dtype=dtype)
    wide = torch.cat((delta, u), dim=1)
    views = (
        wide.chunk(2, dim=1)[1], u.mT.contiguous().mT, A, B[..., :1].expand(B.shape), C.mT.contiguous().mT, D,
        bias.expand(2, 6)[1],
    )  # fmt: skip
    dy = torch.ones((), dtype=dtype, device=DEVICE).expand(u.shape)
    backend = cuda_backend.BACKEND
    for tensors in (views, (wide[:, :6], *views[1:])):
        copies = [t.contiguous() for t in tensors]
        found = (*backend.scan_1d(*tensors, True), *backend.scan_1d_backward(dy, *tensors, True))
        expected = (*backend.scan_1d(*copies, True), *backend.scan_1d_backward(dy.contiguous(), *copies, True))
        assert all(map(torch.equal, found, expected))


@pytest.mark.slow  # test_scan_grid.py has one that is fast
@runs
def test_through_the_operator(monkeypatch):
    """As users call it, with a gate, and with a B that has no groups of its own."""
    monkeypatch.setattr(cuda_backend.BACKEND, "why_not", lambda: None)
    monkeypatch.setattr(cuda_backend.BACKEND, "why_not_on", lambda device, dtype: None)
    u, delta, A, B, C, D, bias = (t.requires_grad_() for t in problem(L=30, N=2, groups=2, batch=2))
    results = []
    for backend in ("cuda", "torch"):
        y, last = selective_scan(
            u, delta, A, B[:, 0], C, D, u, bias, delta_softplus=True, return_last_state=True, backend=backend
        )
        results.append((y, last, *torch.autograd.grad(y.square().sum(), (u, delta, A, B, C, D, bias))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))


def test_more_states_than_the_kernels_hold_go_elsewhere():
    tensors = problem(L=5, N=17)
    other = cuda_backend._fallback()
    found = (
        *cuda_backend.BACKEND.scan_1d(*tensors, True),
        *cuda_backend.BACKEND.scan_1d_backward(tensors[0], *tensors, True),
    )
    expected = (*other.scan_1d(*tensors, True), *other.scan_1d_backward(tensors[0], *tensors, True))
    assert all(map(torch.equal, found, expected))


def test_plans_fill_the_gpu(monkeypatch):
    emulate(monkeypatch, processors=132)
    mamba = lines.plan_for(8, 1536, 1, 2048, 16, 0)
    assert (mamba.segment_warps, mamba.parts, mamba.segment_resident) == (6, 1, 2)  # 256 programs
    single = lines.plan_for(1, 1536, 1, 2048, 16, 0)
    assert (single.segment_warps, single.parts) == (12, 4)
    assert lines.plan_for(64, 384, 4, 3136, 16, 0).segment_warps == 4
    assert lines.plan_for(64, 384, 4, 3136, 1, 0).warps == 3  # 96 channels of a group are three warps
    assert lines.plan_for(64, 3072, 4, 49, 1, 0).rows == 4
    alone = lines.plan_for(2, 4, 4, 49, 16, 0)  # a group of a single channel
    assert (alone.across, alone.segment_warps, alone.parts) == (1, 1, 1)
    assert mamba.across == 0 and lines.plan_for(1, 1536, 1, 2048, 16, 0).across == 4


# --- on a GPU -------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(L=2048, channels=192, batch=2),
        dict(L=3136, channels=96, groups=4),
        dict(L=784, channels=192, groups=4, N=1),
        dict(L=197, channels=68, groups=2, N=9),
        dict(L=49, channels=256, groups=4, batch=3),
    ],
    ids=str,
)
def test_at_full_size(sizes, dtype):
    check(problem(dtype=dtype, **sizes))


@gpu
@pytest.mark.parametrize("states", [1, 16])
def test_same_bits_every_time(states):
    tensors = problem(L=784, channels=96, groups=2, batch=4, N=states, dtype=torch.bfloat16)
    results = []
    for _ in range(2):
        y, last = cuda_backend.BACKEND.scan_1d(*tensors, True)
        results.append((y, last, *cuda_backend.BACKEND.scan_1d_backward(y, *tensors, True)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@gpu
def test_operator_contract_and_compiler():
    tensors = [t.requires_grad_() for t in problem(L=130, groups=2)]
    torch.library.opcheck(torch.ops.medmamba.scan_1d.default, (*tensors, True, "cuda"))
    compiled = torch.compile(lambda *t: selective_scan(*t[:6], delta_bias=t[6], delta_softplus=True), fullgraph=True)
    y = selective_scan(*tensors[:6], delta_bias=tensors[6], delta_softplus=True)
    torch.testing.assert_close(compiled(*tensors), y)


@gpu
def test_takes_no_more_memory_than_its_outputs_and_some_numbers_per_line():
    tensors = problem(L=2048, channels=256, batch=4, dtype=torch.bfloat16)
    cuda_backend.BACKEND.scan_1d_backward(tensors[0], *tensors, True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = cuda_backend.BACKEND.scan_1d_backward(tensors[0], *tensors, True)
    kept = sum(g.numel() * g.element_size() for g in gradients)
    lines_of_tokens = 4 * 256
    assert torch.cuda.max_memory_allocated() - before - kept < lines_of_tokens * 4 * (16 + 32 + 1) * 1.5 + 2**20
