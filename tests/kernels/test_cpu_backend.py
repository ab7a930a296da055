"""The native CPU backend against the definition in float64, in every variant that this processor runs."""

import importlib.util
import itertools
import os
import subprocess
import sys
import threading

import pytest
import torch

from medmamba import selective_scan_2d
from medmamba.kernels import resolve_backend
from medmamba.kernels.backends import cpu as native
from medmamba.kernels.backends import eager as torch_backend

pytestmark = pytest.mark.skipif(native.BACKEND.why_not() is not None, reason=f"native: {native.BACKEND.why_not()}")

VARIANTS = range(native.load_library().medmamba_best_variant() + 1 if native.BACKEND.why_not() is None else 0)
NAMES_2D = ("y", "dx", "dproj", "ddt_weight", "ddt_bias", "dA", "dD")
NAMES_1D = ("y", "last_state", "du", "ddelta", "dA", "dB", "dC", "dD", "ddelta_bias")


@pytest.fixture(autouse=True)
def seed_and_thread_count():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def inputs_2d(B, H, W, C, R, N, seed=0):
    """Step sizes from 0.001 to 1 and A near -1 ... -N, as in trained models."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    A = -torch.arange(1.0, N + 1) * torch.empty(4, C, N).uniform_(0.8, 1.2, generator=g)
    return randn(B, H, W, C), randn(B, H, W, 4, R + 2 * N), randn(4, C, R) / R**0.5, randn(4, C) - 3, A, randn(4, C)


def inputs_1d(B, C, G, N, L, softplus=True, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    delta = randn(B, C, L) - 2 if softplus else randn(B, C, L).abs() * 0.1
    bias = randn(C) if softplus else torch.zeros(C)
    return (
        randn(B, C, L),
        delta,
        -8 * torch.rand(C, N, generator=g),
        randn(B, G, N, L),
        randn(B, G, N, L),
        randn(C),
        bias,
    )


def run_2d(backend, tensors, dy):
    """Output and all gradients."""
    x, A = tensors[0], tensors[4]
    shape = (0,)
    if backend.BACKEND.chunk:
        shape = (x.shape[0], 4, -(-x.shape[1] * x.shape[2] // backend.BACKEND.chunk), A.shape[2], x.shape[3])
    states = torch.empty(shape)
    y = backend.BACKEND.scan_2d(*tensors, states)
    return y, *backend.BACKEND.scan_2d_backward(dy, *tensors, states)


def run_1d(backend, tensors, dy, softplus):
    return *backend.BACKEND.scan_1d(*tensors, softplus), *backend.BACKEND.scan_1d_backward(dy, *tensors, softplus)


def double(tensors):
    return [t.double() for t in tensors]


def assert_close_as_torch(names, actual, expected, plain, rms=False):
    """Errors at most thrice those of plain PyTorch in float32, or 2e-6 of the largest value; `rms`: at most twice."""
    for name, a, e, p in zip(names, actual, expected, plain, strict=True):
        assert a.shape == e.shape, name
        assert a.dtype == p.dtype, name
        assert a.is_contiguous(), name
        error, allowed = (a - e).abs(), (p - e).abs()
        if rms:
            assert error.square().mean() <= 4 * allowed.square().mean(), name
        else:
            assert error.max() <= 3 * allowed.max() + 2e-6 * e.abs().max(), name


SIZES = [(1, 1), (1, 7), (7, 9), (14, 14), (8, 3)]


@pytest.mark.parametrize("size", SIZES)
def test_2d_values_and_gradients(size, monkeypatch):
    for i, (C, R, N) in enumerate(itertools.product((4, 16, 24, 96), (1, 3), (16, 5, 1))):
        tensors = inputs_2d(1 + i % 3, *size, C, R, N)
        dy = torch.randn_like(tensors[0])
        expected = run_2d(torch_backend, double(tensors), dy.double())
        plain = run_2d(torch_backend, tensors, dy)
        for variant in VARIANTS:
            monkeypatch.setattr(native, "best_variant", lambda v=variant: v)
            assert_close_as_torch(NAMES_2D, run_2d(native, tensors, dy), expected, plain)


@pytest.mark.parametrize("groups", [1, 4, 24])
@pytest.mark.parametrize("softplus", [True, False])
def test_1d_values_and_gradients(groups, softplus, monkeypatch):
    for N, length in ((16, 1), (16, 63), (5, 64), (1, 65), (16, 130)):
        tensors = inputs_1d(2, 24, groups, N, length, softplus)
        dy = torch.randn_like(tensors[0])
        expected = run_1d(torch_backend, double(tensors), dy.double(), softplus)
        plain = run_1d(torch_backend, tensors, dy, softplus)
        for variant in VARIANTS:
            monkeypatch.setattr(native, "best_variant", lambda v=variant: v)
            assert_close_as_torch(NAMES_1D, run_1d(native, tensors, dy, softplus), expected, plain)


def test_errors_do_not_grow_with_length(monkeypatch):
    """The longest sequence of a 224x224 image: 3136 tokens."""
    tensors = inputs_2d(1, 56, 56, 16, 3, 16)
    dy = torch.randn_like(tensors[0])
    expected = run_2d(torch_backend, double(tensors), dy.double())
    plain = run_2d(torch_backend, tensors, dy)
    for variant in VARIANTS:
        monkeypatch.setattr(native, "best_variant", lambda v=variant: v)
        actual = run_2d(native, tensors, dy)
        assert_close_as_torch(NAMES_2D, actual, expected, plain)
        assert_close_as_torch(NAMES_2D, actual, expected, plain, rms=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float32, torch.float64, torch.bfloat16])
def test_half_precision(dtype, parameters, monkeypatch):
    x, proj, *rest = inputs_2d(2, 7, 9, 24, 3, 16)
    tensors = [x.to(dtype), proj.to(dtype), *(t.to(parameters) for t in rest)]
    dy = torch.randn_like(x).to(dtype)
    expected = run_2d(torch_backend, double(tensors), dy.double())
    for variant in VARIANTS:
        monkeypatch.setattr(native, "best_variant", lambda v=variant: v)
        actual = run_2d(native, tensors, dy)
        for name, a, e, t in zip(NAMES_2D, actual, expected, (x.to(dtype), *tensors), strict=True):
            assert a.dtype == t.dtype, name
            # What the output type rounds away, and the float32 recurrence.
            rounding = torch.finfo(a.dtype).eps * e.abs() if a.dtype != torch.float64 else 0
            assert ((a.double() - e).abs() <= rounding + 3e-6 * e.abs().max()).all(), name


def test_half_precision_rounds_to_nearest_and_keeps_nan():
    values = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -3e-38, float("inf"), float("nan"), 65519.0, 1e-7])
    for dtype in (torch.bfloat16, torch.float16):
        u = values.to(dtype).view(1, -1, 1)
        channels = u.shape[1]
        # With B = 0, y = D u: exact in float32, so that only the conversions to and from the type are left.
        D = torch.full((channels,), 1.01)
        zeros = torch.zeros(1, 1, 1, 1)
        y, _ = native.BACKEND.scan_1d(
            u, torch.zeros_like(u), -torch.ones(channels, 1), zeros, zeros, D, torch.zeros(channels), False
        )
        expected = (u.float().squeeze() * D).to(dtype)
        finite = expected.isfinite()
        torch.testing.assert_close(y.squeeze()[finite], expected[finite], rtol=0, atol=0)
        assert y.squeeze()[5].isnan()


def test_mixed_types_and_strides():
    x, proj, *rest = inputs_2d(2, 5, 6, 16, 3, 16)
    expected = native.BACKEND.scan_2d(x, proj, *rest, torch.empty(0))
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, proj, *rest)]
    assert not strided[0].is_contiguous()
    assert torch.equal(native.BACKEND.scan_2d(*strided, torch.empty(0)), expected)
    dy = torch.randn(1, 1, 1, 1).expand_as(x)  # what sum().backward() passes
    for a, e in zip(run_2d(native, strided, dy), run_2d(native, (x, proj, *rest), dy.contiguous()), strict=True):
        assert torch.equal(a, e)
    mixed = native.BACKEND.scan_2d(x, proj.bfloat16(), *rest, torch.empty(0))
    torch.testing.assert_close(mixed, native.BACKEND.scan_2d(x, proj.bfloat16().float(), *rest, torch.empty(0)))
    u, delta, A, B, C, D, bias = inputs_1d(2, 24, 4, 16, 50)
    plain = native.BACKEND.scan_1d(u, delta.half().float(), A, B.bfloat16().float(), C, D, bias, True)
    mixed = native.BACKEND.scan_1d(u, delta.half(), A, B.bfloat16(), C, D, bias, True)
    for a, e in zip(mixed, plain, strict=True):
        assert torch.equal(a, e)


def test_empty_batch():
    tensors = inputs_2d(0, 7, 9, 16, 3, 16)
    y, *grads = run_2d(native, tensors, torch.empty(0, 7, 9, 16))
    assert y.shape == (0, 7, 9, 16)
    assert all(g.shape == t.shape and (g == 0).all() for g, t in zip(grads, tensors, strict=True))
    tensors = inputs_1d(0, 8, 4, 16, 5)
    y, last, *grads = run_1d(native, tensors, torch.empty(0, 8, 5), True)
    assert last.shape == (0, 8, 16)
    assert all(g.shape == t.shape and (g == 0).all() for g, t in zip(grads, tensors, strict=True))


@pytest.mark.parametrize("shift", [-60.0, 40.0])
def test_step_sizes_of_any_magnitude(shift, monkeypatch):
    """Decays that underflow, steps too small to change a float: shortcuts for the usual range must not be taken."""
    x, proj, dt_weight, dt_bias, A, D = inputs_2d(1, 7, 9, 24, 3, 16)
    tensors = (x, proj, dt_weight, dt_bias + shift, A, D)
    dy = torch.randn_like(x)
    expected = run_2d(torch_backend, double(tensors), dy.double())
    plain = run_2d(torch_backend, tensors, dy)
    for variant in VARIANTS:
        monkeypatch.setattr(native, "best_variant", lambda v=variant: v)
        actual = run_2d(native, tensors, dy)
        assert all(t.isfinite().all() for t in actual)
        assert_close_as_torch(NAMES_2D, actual, expected, plain)


def test_nan_reaches_what_follows_it(monkeypatch):
    tensors = inputs_1d(1, 24, 1, 16, 100)
    for i, variant in itertools.product((0, 1, 3), VARIANTS):
        monkeypatch.setattr(native, "best_variant", lambda v=variant: v)
        broken = [t.clone() for t in tensors]
        broken[i][..., 40] = float("nan")
        y, _ = native.BACKEND.scan_1d(*broken, True)
        assert y[..., :40].isfinite().all()
        assert y[..., 40:].isnan().all()


@pytest.mark.slow
def test_operator_contract():
    tensors = [t.requires_grad_() for t in inputs_2d(2, 3, 5, 8, 2, 3)]
    torch.library.opcheck(torch.ops.medmamba.scan_2d.default, (*tensors, "native", native.CHUNK))
    torch.library.opcheck(torch.ops.medmamba.scan_2d.default, (*tensors, "native", 0), test_utils="test_schema")
    tensors = [t.requires_grad_() for t in inputs_1d(2, 8, 4, 3, 7)]
    torch.library.opcheck(torch.ops.medmamba.scan_1d.default, (*tensors, True, "native"))


def test_compiles_as_one_node():
    tensors = inputs_2d(1, 7, 9, 24, 3, 16)
    compiled = torch.compile(selective_scan_2d, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors, backend="native"), selective_scan_2d(*tensors, backend="native"))


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_same_bits_every_time(batch):
    tensors = inputs_2d(batch, 7, 9, 40, 3, 16)
    dy = torch.randn_like(tensors[0])
    alone = None
    for threads in (1, 2, 3, 7, 64):  # few images are cut up further, into groups of channels and directions
        torch.set_num_threads(threads)
        first = run_2d(native, tensors, dy)
        for _ in range(5):
            for name, a, b in zip(NAMES_2D, run_2d(native, tensors, dy), first, strict=True):
                assert torch.equal(a, b), (name, threads)
        alone = alone or first
        for name, a, b in zip(NAMES_2D, first, alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item(), msg=f"{name}, {threads}")


def test_1d_same_bits_every_time():
    tensors = inputs_1d(2, 80, 2, 16, 100)
    dy = torch.randn_like(tensors[0])
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        first = run_1d(native, tensors, dy, True)
        for a, b in zip(run_1d(native, tensors, dy, True), first, strict=True):
            assert torch.equal(a, b)


def test_calls_from_several_python_threads():
    torch.set_num_threads(2)
    cases = []
    for seed in range(4):
        tensors = inputs_2d(2, 7, 9, 40, 3, 16, seed)
        cases.append((tensors, run_2d(native, tensors, tensors[0])))
    wrong = []

    def work(tensors, expected):
        torch.set_num_threads(2)
        for _ in range(20):
            for name, a, e in zip(NAMES_2D, run_2d(native, tensors, tensors[0]), expected, strict=True):
                if not torch.equal(a, e):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=case) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_works_in_forked_processes():
    """A child of fork has none of the threads that the parent started."""
    torch.set_num_threads(3)
    tensors = inputs_2d(2, 7, 9, 40, 3, 16)
    expected = native.BACKEND.scan_2d(*tensors, torch.empty(0))
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            ok = all(torch.equal(native.BACKEND.scan_2d(*tensors, torch.empty(0)), expected) for _ in range(3))
            os._exit(0 if ok else 1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert torch.equal(native.BACKEND.scan_2d(*tensors, torch.empty(0)), expected)


def test_process_ends_while_threads_work():
    program = """
import threading, torch
from medmamba.kernels.backends import cpu as native
torch.set_num_threads(3)
x, proj = torch.randn(2, 20, 20, 64), torch.randn(2, 20, 20, 4, 35)
weight, bias, A, D = torch.randn(4, 64, 3), torch.randn(4, 64), -torch.rand(4, 64, 16), torch.randn(4, 64)
states, y = torch.empty(0), torch.empty_like(x)
# Only our library is called: a daemon thread inside PyTorch's C++ may abort any Python process that ends.
call = native._scan_2d(x, proj, weight, A, dt_bias=bias, D=D, states=states, y=y)
def work():
    while True:
        native.call_library("scan_2d_forward", call)
        started.set()
started = threading.Event()
threading.Thread(target=work, daemon=True).start()
started.wait()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")


def test_threads_share_the_work(monkeypatch):
    """Reads the processor time of the calling thread: with two threads it does about half of the work itself."""
    import time

    tensors = inputs_2d(4, 28, 28, 64, 3, 16)
    monkeypatch.setattr(native, "best_variant", lambda: 0)

    def own_time(threads):
        torch.set_num_threads(threads)
        times = []
        for _ in range(10):
            start = time.thread_time()
            native.BACKEND.scan_2d(*tensors, torch.empty(0))
            times.append(time.thread_time() - start)
        return min(times)

    assert own_time(2) < 0.8 * own_time(1)


def load_build():
    path = native.LIBRARIES.parent / "csrc" / "build.py"
    spec = importlib.util.spec_from_file_location("build", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_libraries_are_built_from_these_sources():
    build = load_build()
    expected = build.source_hash().encode()
    assert native.load_library().medmamba_source() == expected
    for name in build.TARGETS:
        assert expected in (native.LIBRARIES / name).read_bytes(), f"{name} is stale: run `make kernels`"


def test_every_platform_finds_its_library():
    names = {
        ("linux", "x86_64"): "linux-x86_64.so",
        ("linux", "aarch64"): "linux-aarch64.so",
        ("darwin", "x86_64"): "macos-x86_64.dylib",
        ("darwin", "arm64"): "macos-arm64.dylib",
        ("win32", "AMD64"): "windows-x86_64.dll",
    }
    assert {native.library_name(*platform) for platform in names} == set(names.values()) == set(load_build().TARGETS)
    for platform, name in names.items():
        assert native.library_name(*platform) == name


def test_widest_instructions_are_chosen():
    best = {"DEFAULT": 0, "AVX2": 1, "AVX512": 2}.get(torch.backends.cpu.get_cpu_capability())
    if best is None or "ATEN_CPU_CAPABILITY" in os.environ:
        pytest.skip("PyTorch does not tell what this processor has")
    assert native.best_variant() == best
    assert [native.load_library().medmamba_lanes(v) for v in VARIANTS] == [4, 8, 16][: best + 1]


def test_without_a_library_the_reason_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "load_library", native.load_library.__wrapped__)  # the uncached function
    monkeypatch.setattr(native, "LIBRARIES", tmp_path)
    assert "no prebuilt library for this platform" in native.BACKEND.why_not()
    (tmp_path / native.library_name()).write_bytes(b"not a library")
    assert native.BACKEND.why_not()
    with pytest.warns(UserWarning, match="plain PyTorch"):
        assert resolve_backend(torch.device("cpu"), torch.float32) == "torch"


def test_it_is_what_a_cpu_runs(monkeypatch):
    monkeypatch.delenv("MEDMAMBA_SCAN", raising=False)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert resolve_backend(torch.device("cpu"), dtype) == "native"
    assert "not torch.float64" in native.BACKEND.why_not_on(torch.device("cpu"), torch.float64)
    assert "not on cuda" in native.BACKEND.why_not_on(torch.device("cuda"), torch.float32)
